"""The launcher of several processes, with a small program in the place of train.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "scripts" / "launch_local.py"

# Writes what it was given to I.json beside it; then comes what each process does.
PROGRAM = """
import json, os, pathlib, signal, sys, time

folder = pathlib.Path(__file__).parent
me = next(word.partition("=")[2] for word in sys.argv if word.startswith("--process_id="))
signals = []

def note(number, frame):
    signals.append(number)
    (folder / f"{me}.signals").write_text(json.dumps(signals))

def stop_when_told(status):
    while not signals:
        time.sleep(0.01)
    time.sleep(0.5)  # so that a second signal would be seen
    sys.exit(128 + signals[0] if status is None else status)

def stop_when_another_has(status):
    while not (folder / "gone").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    sys.exit(status)

def leave(status):
    (folder / "gone").touch()
    sys.exit(status)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
temporary = folder / f"{me}.tmp"
temporary.write_text(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ)}))
temporary.rename(folder / f"{me}.json")
"""


@pytest.fixture
def start(tmp_path):
    """Launches processes of which number I does actions[I], and the others what `others` says."""
    launchers = []

    def launch(others, actions=None, *, words=(), processes=3, grace=20, text=True):
        cases = [f"if me == '{index}':\n    {action}\n    sys.exit()" for index, action in (actions or {}).items()]
        program = tmp_path / "program.py"
        program.write_text("\n".join([PROGRAM, *cases, others, ""]))
        flags = [f"--processes={processes}", f"--grace={grace}", f"--program={program}"]
        command = [sys.executable, LAUNCHER, *flags, "--", *words]
        launchers.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=text))
        return launchers[-1]

    yield launch
    for launcher in launchers:
        launcher.kill()
        launcher.communicate()


def finish(launcher, timeout=60):
    out, err = launcher.communicate(timeout=timeout)
    return launcher.returncode, out, err


def started(folder, processes=3):
    """What each process wrote down when it began."""
    paths = [folder / f"{index}.json" for index in range(processes)]
    wait_until(lambda: all(path.exists() for path in paths))
    return [json.loads(path.read_text()) for path in paths]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_launcher_gives_each_process_its_place_and_arguments(start, tmp_path):
    status, _, err = finish(start("pass", words=["--config=a.py", "--", "--config.mesh.sp=4"]))
    assert (status, err) == (0, "")
    notes = started(tmp_path)
    (address,) = {note["argv"][0] for note in notes}
    assert address.startswith("--coordinator_address=127.0.0.1:")
    assert int(address.rpartition(":")[2]) > 0
    for index, note in enumerate(notes):
        assert note["argv"][1:3] == ["--num_processes=3", f"--process_id={index}"]
        assert note["argv"][3:] == ["--config=a.py", "--", "--config.mesh.sp=4"]
        assert note["env"]["JAX_PLATFORMS"] == "cpu"
    assert len({note["pid"] for note in notes}) == 3


def test_launcher_names_the_process_of_each_whole_line(start):
    status, out, err = finish(start("for _ in range(300): print(me * 200); print('to stderr ' + me, file=sys.stderr)"))
    assert status == 0
    assert sorted(set(out.splitlines())) == [f"[{me}] {str(me) * 200}" for me in range(3)]
    assert sorted(set(err.splitlines())) == [f"[{me}] to stderr {me}" for me in range(3)]
    assert len(out.splitlines()) == len(err.splitlines()) == 900


def test_launcher_passes_output_that_is_no_text(start):
    launcher = start(r"sys.stdout.buffer.write(b'\xff\n\nend')", processes=1, text=False)
    assert finish(launcher) == (0, b"[0] \xff\n[0] \n[0] end\n", b"")


def test_launcher_leaves_out_gloos_counting_alone(start):
    gloo = "[Gloo] Rank 3 is connected to 15 peer ranks. Expected number of connected peer ranks is : 15"
    status, out, _ = finish(start(f"print('before\\n{gloo}\\n{gloo}after [Gloo] Rank\\n')", processes=1))
    assert (status, out) == (0, "[0] before\n[0] after [Gloo] Rank\n[0] \n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_launcher_sends_a_signal_to_each_process_once(start, tmp_path, number):
    launcher = start("stop_when_told(None)")
    notes = started(tmp_path)
    launcher.send_signal(number)
    status, _, err = finish(launcher)
    assert status == 128 + number
    assert "is killed" not in err
    assert [json.loads((tmp_path / f"{index}.signals").read_text()) for index in range(3)] == [[number]] * 3
    assert not any(alive(note["pid"]) for note in notes)


def test_launcher_puts_processes_in_groups_of_their_own(start, tmp_path):
    launcher = start("stop_when_told(0)")
    pids = [note["pid"] for note in started(tmp_path)]
    assert [os.getpgid(pid) for pid in pids] == pids
    launcher.terminate()
    assert finish(launcher)[0] == 0


def test_launcher_status_is_that_of_the_first_failure(start):
    status, _, err = finish(start("stop_when_another_has(1)", {2: "leave(7)"}))
    assert status == 7
    assert "[launcher] process 2 ended with 7; the others have 20 s to stop\n" in err
    assert "is killed" not in err


def test_launcher_counts_signals_as_a_shell_does(start):
    status, _, err = finish(start("pass", {1: "os.kill(os.getpid(), signal.SIGKILL)"}, processes=2))
    assert status == 137
    assert "process 1 ended with 137" in err


def test_launcher_hurries_nobody_when_one_finishes(start):
    status, _, err = finish(start("time.sleep(1.5)", {0: "leave(0)"}, grace=0))
    assert (status, err) == (0, "")


def test_launcher_kills_after_the_grace(start, tmp_path):
    launcher = start("time.sleep(600)", {0: "time.sleep(1); leave(2)"}, grace=1)
    pids = [note["pid"] for note in started(tmp_path)]
    status, _, err = finish(launcher)
    assert status == 2
    assert "process 1 has not stopped within 1 s and is killed" in err
    assert "process 2 has not stopped within 1 s and is killed" in err
    assert not any(map(alive, pids))


def test_launcher_kills_what_ignores_sigterm(start, tmp_path):
    launcher = start("time.sleep(600)", grace=1, processes=2)
    pids = [note["pid"] for note in started(tmp_path, processes=2)]
    launcher.terminate()
    status, _, err = finish(launcher)
    assert status == 137
    assert "process 0 has not stopped within 1 s and is killed" in err
    assert not any(map(alive, pids))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes prctl")
def test_launcher_is_outlived_by_no_process(start, tmp_path):
    launcher = start("time.sleep(600)")
    pids = [note["pid"] for note in started(tmp_path)]
    assert all(map(alive, pids))
    launcher.kill()
    assert finish(launcher)[0] == -signal.SIGKILL
    wait_until(lambda: not any(map(alive, pids)))


def test_launcher_stops_processes_that_nobody_reads(start, tmp_path):
    launcher = start("while True: print('x' * 100)", processes=2)
    started(tmp_path, processes=2)
    launcher.stdout.close()
    launcher.stderr.close()
    assert launcher.wait(30) != 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=0"], "--processes=0 must be positive; 2 is the fewest that talk to each other"),
        (["--grace=-1"], "--grace=-1 must not be negative; 0 kills the others at once"),
        (["--grace=nan"], "--grace=nan must not be negative; 0 kills the others at once"),
        (["--program=nowhere.py"], "--program=nowhere.py: there is no such file; name a Python program"),
        (["--config=a.py"], "--config=a.py is not an argument of the launcher, so write -- before the arguments of"),
        (["--confg=a.py", "--", "x"], "--confg=a.py is not an argument of the launcher; see launch_local.py --help\n"),
    ],
)
def test_launcher_starts_nothing_on_a_mistake(flags, message):
    done = subprocess.run([sys.executable, LAUNCHER, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
