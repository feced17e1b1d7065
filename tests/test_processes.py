"""train.py on several processes of this machine, through JAX's own runtime and gloo."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ring_attention.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = [
    f"--config={ROOT}/configs/tiny.py",
    *("--config.model.num_layers=1", "--config.model.ffn_chunk=64", "--config.model.loss_chunk=64"),
    *("--config.seq_len=64", "--config.data.streams=6", "--config.data.holdout_fraction=0.3"),
    *("--config.num_steps=8", "--config.eval_every=4", "--config.log_every=1"),
]
RING_OF_4 = ["--config.mesh.fsdp=1", "--config.mesh.sp=4", "--config.mesh.tp=1"]
FSDP_AND_RING_OF_4 = ["--config.mesh.fsdp=2", "--config.mesh.sp=4", "--config.mesh.tp=1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for file in sorted(ROOT.glob("ring_attention/data/*.py")):
        (folder / file.name).write_bytes(file.read_bytes() + b"\n")
    return f"--config.data.paths={folder}/*.py"


def start(num_processes, *flags, folders=None, **own):
    """The processes of one run, each in the folder of this repository or its own, with flags of its own.

    Args:
      num_processes: of them.
      flags: of all of them.
      folders: {number of a process: where it runs}.
      own: {"process_1": [flags]}.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    env.pop("XLA_FLAGS", None)
    processes = []
    for number in range(num_processes):
        who = [address, f"--num_processes={num_processes}", f"--process_id={number}"] if num_processes > 1 else []
        command = [sys.executable, str(ROOT / "train.py"), *SMALL, *who, *flags, *own.get(f"process_{number}", [])]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        cwd = (folders or {}).get(number, ROOT)
        processes.append(subprocess.Popen(command, cwd=cwd, env=env, **pipes))
    return processes


def finish(processes, timeout=400):
    """(exit status, stdout, stderr) of each process, none of which outlives this call."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def losses(folder):
    """{(step, name): number} of all that does not depend on the clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return {(x["step"], name): x[name] for x in lines for name in ("loss", "heldout_loss", "grad_norm") if name in x}


def wait_for_step(folder, step, processes, timeout=400):
    end = time.monotonic() + timeout
    while not any(line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")):
        assert time.monotonic() < end
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, [(process.returncode, process.stderr.read()[-2000:]) for process in ended]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """(run folder, losses) of one process."""
    folder = tmp_path_factory.mktemp("alone")
    ((status, _, stderr),) = finish(start(1, corpus, *FSDP_AND_RING_OF_4, f"--config.run_dir={folder}"))
    assert status == 0, stderr
    return folder, losses(folder)


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_several_processes_have_the_losses_of_one_and_only_the_first_speaks(alone, corpus, tmp_path, num_processes):
    ended = finish(start(num_processes, corpus, *FSDP_AND_RING_OF_4, f"--config.run_dir={tmp_path}"))
    assert [status for status, _, _ in ended] == [0] * num_processes, ended
    got, (_, want) = losses(tmp_path), alone
    assert got.keys() == want.keys()
    assert len(got) == 18
    assert got == pytest.approx(want, rel=1e-5)
    assert f"in {num_processes} processes" in ended[0][1]
    assert "Run folder:" in ended[0][1]
    assert not any("documents to train on" in stdout or "Run folder:" in stdout for _, stdout, _ in ended[1:])


ELSEWHERE = {
    "4 devices, striped": [*RING_OF_4, "--config.attention.layout=striped"],
    "2x4 devices, contiguous": [
        *("--config.mesh.dp=2", "--config.mesh.fsdp=1", "--config.mesh.sp=4", "--config.mesh.tp=1"),
        "--config.attention.layout=contiguous",
    ],
}


@pytest.mark.parametrize("placement", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_run_goes_on_elsewhere_and_its_losses_agree_but_for_rounding(alone, corpus, tmp_path, placement):
    folder, want = alone
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    ((status, stdout, stderr),) = finish(start(1, corpus, *placement, f"--config.run_dir={tmp_path}/run"))
    assert status == 0, stderr
    assert "Going on from step 4." in stdout
    assert "the losses agree but for rounding." in stdout
    got = losses(tmp_path / "run")
    assert got.keys() == want.keys()
    assert got == pytest.approx(want, rel=1e-5)
    assert got != want, "another order of sums rounds otherwise; if not, nothing moved"


def test_a_signal_to_one_process_stops_all_after_a_checkpoint_and_fewer_processes_go_on(corpus, tmp_path):
    flags = [corpus, *RING_OF_4, f"--config.run_dir={tmp_path}", "--config.num_steps=4000", "--config.eval_every=4000"]
    processes = start(4, *flags)
    wait_for_step(tmp_path, 3, processes)
    begin = time.monotonic()
    processes[2].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert time.monotonic() - begin < 30
    assert [status for status, _, _ in ended] == [143] * 4, ended
    (line,) = [line for line in ended[0][2].splitlines() if line.startswith("Stopped by SIGTERM after step ")]
    step = int(line.split()[5])
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    processes = start(2, *flags)
    assert any(line.startswith(f"Going on from step {step}.") for line in processes[0].stdout)
    processes[1].send_signal(signal.SIGTERM)  # the first step is still being compiled
    ended = finish(processes)
    assert [status for status, _, _ in ended] == [143] * 2, ended
    assert f"Stopped by SIGTERM after step {step + 1} of 4000" in ended[1][2]


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.nightly)])
def test_when_one_process_is_killed_the_others_say_which_and_stop_within_a_minute(corpus, tmp_path, victim):
    flags = [*RING_OF_4, "--config.num_steps=100000", "--config.eval_every=100000", "--config.checkpoint_every=100000"]
    processes = start(4, corpus, *flags, f"--config.run_dir={tmp_path}")
    wait_for_step(tmp_path, 3, processes)
    begin = time.monotonic()
    processes[victim].kill()
    ended = finish(processes, timeout=120)
    assert time.monotonic() - begin < 60
    del ended[victim]
    assert [status for status, _, _ in ended] == [1] * 3, ended
    for _, _, stderr in ended:
        assert f"train.py: error: process {victim} of 4 has not been heard of for" in stderr.splitlines()[-1]


def test_a_mistake_that_one_process_makes_ends_the_others_with_its_words(corpus, tmp_path):
    texts = Path(corpus.partition("=")[2]).parent
    flags = [*RING_OF_4, f"--config.run_dir={tmp_path}/run", "--config.data.paths=*.py"]
    (tmp_path / "empty").mkdir()
    processes = start(2, *flags, folders={0: texts, 1: tmp_path / "empty"})
    (first, _, stderr), (second, _, words) = finish(processes)
    assert (first, second) == (2, 2), (stderr, words)
    assert "no file matches" in words.splitlines()[-1]
    assert "process 1 of 2 has stopped: data.paths=" in stderr


def test_processes_that_were_started_with_other_flags_end_at_once_and_name_both_values(corpus, tmp_path):
    flags = [*RING_OF_4, f"--config.run_dir={tmp_path}/run", corpus]
    began = time.monotonic()
    outputs = finish(start(2, *flags, process_1=["--config.optimizer.learning_rate=0.125"]))
    assert time.monotonic() - began < 60
    for status, stdout, stderr in outputs:
        assert (status, stdout) == (2, ""), stderr
        assert "Traceback" not in stderr, stderr
        line = stderr.splitlines()[-1]
        assert "optimizer.learning_rate=0.125: so in process 1, and in process 0 it is 0.01" in line
