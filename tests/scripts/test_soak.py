"""The harness that kills: a trainer that keeps its promises passes, one that breaks any of them does not.

`pretend_trainer.py` stands in for train.py where the harness is tested; the slow test really trains.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_lines import run_command

from scripts.verify.soak import faults
from scripts.verify.soak.faults import FAULTS
from scripts.verify.soak.run import EndedError, HangError, Run, Trainer
from scripts.verify.soak.session import Session, line_of
from scripts.verify.soak.verdicts import Outcome, first_difference, read_lines, worst_relative_difference

REPOSITORY = Path(__file__).parents[2]
PRETENDER = [sys.executable, str(Path(__file__).parent / "pretend_trainer.py")]
EVERY = 3
PATIENT, HASTY = 60, 4  # seconds; a pretender starts in a tenth of one
LINES = [{"step": step, "loss": 5 - step / 7, "tokens_per_second": 100.0 * step} for step in range(1, 9)]


def soak(tmp_path, *kinds, breaks="", rounds=1, steps=80, deadline=PATIENT):
    trainer = Trainer(
        command=[*PRETENDER, f"--config.num_steps={steps}", f"--config.checkpoint_every={EVERY}"],
        poison=[*PRETENDER, "--poison"],
        env=os.environ | {"BREAKS": breaks},
        logs=tmp_path / "logs",
        num_steps=steps,
        checkpoint_every=EVERY,
    )
    trainers = {1: trainer, 4: dataclasses.replace(trainer, processes=4)}
    session = Session(trainers, tmp_path, seed=0, deadline=deadline, kinds=kinds)
    session.run(rounds=rounds)
    return session


def problems(session):
    return [problem for outcome in [*session.outcomes, *session.ends] for problem in outcome.problems]


def test_soak_passes_a_trainer_that_keeps_its_promises(tmp_path):
    session = soak(tmp_path, *FAULTS, steps=200)
    assert problems(session) == []
    assert sorted(outcome.kind for outcome in session.outcomes) == sorted(FAULTS)
    assert {end.step for end in session.ends} == {200}
    figures = session.as_json()
    assert figures["problems"] == 0
    assert figures["kills_survived"] == 3 + 2 + 1 + 2 + 2  # two in kill_starting, one in those that damage
    assert 0 < figures["most_steps_lost"] <= 3 * EVERY
    assert json.loads(json.dumps(figures)) == figures
    assert session.table().row_count == len(FAULTS)


@pytest.mark.slow
def test_soak_counts_twenty_kills_of_one_run(tmp_path):
    session = soak(tmp_path, "kill", "kill_saving", "kill_saved", "kill_starting", rounds=4, steps=400)
    assert problems(session) == []
    assert session.as_json()["most_kills_of_one_run"] == 20
    assert len(session.ends) == 1


def slowly(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


BROKEN = [
    ("bits", "kill", "wrong losses"),
    slowly("metrics", "kill", "wrong losses"),
    slowly("mesh", "other_mesh", "wrong losses"),
    ("digest", "flip", "wrong losses"),
    slowly("digest", "truncate", "wrong losses"),
    ("interval", "kill", "lost too much"),
    ("atomic", "kill", "corrupted state"),
    ("room", "disk_full", "corrupted state"),
    ("naming", "flip", "wrong message"),
    slowly("name", "lose_process", "wrong message"),
    ("lock", "second_run", "wrong exit"),
    slowly("not finite", "not_finite", "wrong exit"),
    slowly("hang", "kill", "hang"),
    ("sigterm", "terminate", "hang"),
    slowly("sigterm", "terminate_process", "hang"),
    slowly("peers", "lose_process", "hang"),
    slowly("peers", "freeze_process", "hang"),
]
ROUNDS = {"atomic": 6, "interval": 3, "bits": 1, "hang": 1, "sigterm": 1, "peers": 1}  # some are not seen every time


@pytest.mark.parametrize(("breaks", "kind", "sort"), BROKEN, ids=lambda value: value.replace(" ", "_"))
def test_soak_finds_a_trainer_that_breaks_a_promise(tmp_path, monkeypatch, breaks, kind, sort):
    for module, name in [(faults, "SIGTERM_SECONDS"), (faults, "PEERS_SECONDS")]:
        monkeypatch.setattr(module, name, 1)
    steps, deadline = (400, HASTY) if sort == "hang" else (150, PATIENT)
    session = soak(tmp_path, kind, breaks=breaks, rounds=ROUNDS.get(breaks, 2), steps=steps, deadline=deadline)
    figures = session.as_json()
    assert figures["by_sort"][sort] >= 1
    assert figures["problems"] >= figures["by_sort"][sort]


def test_disk_full_without_tmpfs_limits_the_size_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "MOUNT", "exit 1")
    session = soak(tmp_path, "disk_full", steps=200)
    assert problems(session) == []
    assert session.outcomes[0].notes[0].startswith("RLIMIT_FSIZE: ended after step")


def started(tmp_path, script, deadline=PATIENT):
    """A run that executes a script of Python, whatever its folder."""
    command = [sys.executable, "-c", script]
    run = Run(Trainer(command, [], os.environ, tmp_path, num_steps=1, checkpoint_every=1), tmp_path, deadline)
    run.start()
    return run


def test_hang_is_ended_with_its_stacks_in_the_log(tmp_path):
    script = "import time\ndef the_place_where_it_hangs():\n    time.sleep(1000)\nthe_place_where_it_hangs()"
    run = started(tmp_path, script, deadline=2)
    with pytest.raises(HangError, match="did not do anything in 2 s: File .* in the_place_where_it_hangs"):
        run.until(lambda: False, "do anything")
    assert run.is_dead()
    assert "the_place_where_it_hangs" in run.children[0].read(".err")


def test_process_that_ends_is_told_from_one_that_hangs(tmp_path):
    run = started(tmp_path, "import sys; print('no room', file=sys.stderr); sys.exit(3)")
    with pytest.raises(EndedError, match="exit status 3 before it could go on: no room"):
        run.until(lambda: False, "go on")


def test_no_trainer_outlives_the_harness(tmp_path):
    script = f"""
import os
from pathlib import Path
from scripts.verify.soak.run import Child
child = Child(["sleep", "1000"], os.environ, Path({str(tmp_path / "log")!r}))
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    process = Path("/proc", done.stdout.strip(), "cmdline")
    deadline = time.monotonic() + 10
    while process.exists() and process.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process.exists() or not process.read_bytes()


def test_first_difference_sees_one_bit():
    changed = [line | {"loss": math.nextafter(line["loss"], 9)} if line["step"] == 6 else line for line in LINES]
    assert first_difference(changed, LINES).startswith(
        "step 6: loss=4.142857142857144, in the undisturbed run 4.142857142857143"
    )
    assert first_difference([line | {"tokens_per_second": 1.0} for line in LINES[:5]], LINES) is None


@pytest.mark.parametrize(
    "wrong",
    [
        LINES[:3] + LINES[4:],
        LINES[:3] + LINES[2:],
        [*LINES, {"step": 9, "loss": 1.0}],
        [{"step": 1, "tokens_per_second": 0.0}],
        [{"step": 1, "loss": None}],
        [LINES[0] | {"skipped": 1}],
    ],
    ids=["missing", "double", "too_many", "without_loss", "not_finite", "more"],
)
def test_first_difference_sees_lines_that_are_not_the_first(wrong):
    assert first_difference(wrong, LINES) is not None


def test_read_lines_leaves_out_a_torn_last_line():
    text = '{"step": 1, "loss": 2.5}\n{"step": 2, "lo'
    assert read_lines(text) == [{"step": 1, "loss": 2.5}]
    for torn in (text + "\n", "[1]\n" + text, '{"loss": 2.5}\n'):
        with pytest.raises(ValueError, match=r"metrics.jsonl:[12]: .* is no line of metrics"):
            read_lines(torn)


@pytest.mark.parametrize(("bound", "wrong"), [(4, 0), (3, 1)])
def test_require_lost_counts_steps_beyond_the_bound(bound, wrong):
    outcome = Outcome("kill", bound=bound)
    outcome.require_lost(done=10, resumed=6)
    assert outcome.lost == 4
    assert len(outcome.problems) == wrong


def test_worst_relative_difference_compares_step_by_step():
    near = [line | {"loss": line["loss"] * (1 + 1e-6 * line["step"])} for line in LINES]
    assert worst_relative_difference(near, LINES, after=4) == pytest.approx(8e-6)
    assert worst_relative_difference(near[:6], LINES, after=4) == pytest.approx(6e-6)
    for nothing in (LINES[:4], [LINES[6] | {"loss": None}], [{"step": 20, "loss": 1.0}]):
        assert worst_relative_difference(nothing, LINES, after=4) == math.inf


def test_line_of_says_what_went_wrong():
    outcome = Outcome("kill", seconds=83, step=12, notes=["went on from 9, 3 lost"], problems=[("hang", "[x]")])
    assert line_of(outcome).startswith("  1:23  kill               at step   12  went on from 9, 3 lost\n")
    assert r"hang: \[x]" in line_of(outcome)


@pytest.mark.parametrize("flag", ["--faults=kill,kil", "--out=."])
def test_soak_refuses_what_it_cannot_do(flag):
    done = run_command("verify soak", flag)
    assert done.returncode == 2
    assert flag.partition("=")[0] in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_soak_passes_a_real_run(tmp_path):
    kinds = "kill,kill_saving,kill_saved,kill_starting,terminate,truncate,second_run"
    flags = ["--minutes=1.5", "--steps=150", f"--out={tmp_path / 'soak'}", f"--faults={kinds}"]
    done = run_command("verify soak", *flags, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert figures["problems"] == 0
    assert figures["faults"] >= 1
    assert figures["runs_to_the_end"] >= 1
