"""A run under test: processes that are meant to die, watched with a deadline, and what their folder shows."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scripts.launch_local import free_port
from scripts.verify.soak.verdicts import Line, read_lines

REPOSITORY = Path(__file__).resolve().parents[3]
POLL_SECONDS = 0.005  # a checkpoint of a tiny model is written in a tenth of a second
STACK_SECONDS = 10.0  # that a process gets to write down where its threads are
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; JAX warns of a preexec_fn, which forks
if os.getppid() == int(sys.argv[1]):  # the parent may have died before the kernel was asked
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class HangError(Exception):
    """A process did not do in time what it had to; the stacks of its threads are in its log."""


class EndedError(Exception):
    """A process ended by itself where it had to go on."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A command that trains `num_steps` on so many processes, and one that makes a weight of a checkpoint infinite."""

    command: Sequence[str]
    poison: Sequence[str]
    env: Mapping[str, str]
    logs: Path
    num_steps: int
    checkpoint_every: int
    processes: int = 1


class Child(subprocess.Popen):
    """One process. Its stdout goes to `log` + ".out", its stderr to `log` + ".err"."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        guarded = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        env = dict(env) | {"PYTHONFAULTHANDLER": "1"}  # stacks go to stderr on a fatal signal
        with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
            to = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=err)  # a new session: Ctrl-C is for the harness
            super().__init__(guarded, env=env, cwd=REPOSITORY, start_new_session=True, **to)

    def read(self, suffix: str) -> str:
        """Return what it has printed so far to ".out" or ".err"."""
        return self.log.with_suffix(suffix).read_text(encoding="utf-8", errors="replace")

    def last_words(self) -> str:
        """Return the last line on stderr, and the name of the log."""
        return f"{[*self.read('.err').splitlines(), 'nothing on stderr'][-2:][0][:300]} ({self.log})"

    def die_with_stacks(self) -> str:
        """SIGKILL it after faulthandler has written all stacks; return the place of the main thread."""
        self.send_signal(signal.SIGCONT)
        self.send_signal(signal.SIGILL)  # not SIGABRT, which train.py takes for JAX's way to end a process
        try:
            self.wait(STACK_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
        _, _, main = self.read(".err").rpartition("(most recent call first):")  # the main thread comes last
        return next((line.strip() for line in main.splitlines() if line.startswith("  File ")), "no stack")


class Run:
    """A run in a folder, alive or dead; what asks the folder may do so while it is written."""

    def __init__(self, trainer: Trainer, path: Path, deadline: float = 180):
        self.trainer, self.path, self.deadline, self.checkpoints = trainer, path, deadline, path / "checkpoints"
        self.children: list[Child] = []

    def start(self, *flags: str, prefix: Sequence[str] = (), command: Sequence[str] = ()) -> None:
        """Start the run, or go on with it; `prefix` is a command that executes the one after it."""
        words = [*prefix, *(command or self.trainer.command), f"--config.run_dir={self.path}", *flags]
        members, processes = [[]], self.trainer.processes
        if processes > 1:
            words += [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
            members = [[f"--process_id={index}"] for index in range(processes)]
        log = self.trainer.logs / f"{time.monotonic_ns()}"
        self.children = [Child(words + m, self.trainer.env, Path(f"{log}-{i}")) for i, m in enumerate(members)]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes."""
        for child in self.children:
            child.send_signal(number)

    def kill(self) -> None:
        """SIGKILL all processes, and wait until they are gone."""
        self.signal(signal.SIGKILL)
        for child in self.children:
            child.wait()

    def is_dead(self) -> bool:
        """Return whether no process is left."""
        return all(child.poll() is not None for child in self.children)

    def until(self, happened: Callable[[], object], what: str, seconds: float = 0, may_end: bool = False) -> None:
        """Wait until `happened()` is true.

        Raises:
          HangError: if it took longer than `seconds`, by default the deadline; the processes are dead by then.
          EndedError: if a process ended before, unless it `may_end`.
        """
        seconds = seconds or self.deadline
        began = time.monotonic()
        while True:
            gone = [child for child in self.children if child.poll() is not None]
            if happened():  # asked after the look at the children: what they did last counts
                return
            if gone and not may_end:
                raise EndedError(f"exit status {gone[0].returncode} before it could {what}: {gone[0].last_words()}")
            if time.monotonic() - began > seconds:
                places = [f"{child.die_with_stacks()} ({child.log})" for child in self.children if child.poll() is None]
                raise HangError(f"did not {what} in {seconds:g} s: {(places or ['all have ended'])[0]}")
            time.sleep(POLL_SECONDS)

    def codes(self, what: str, seconds: float = 0, but: Child | None = None) -> list[int]:
        """Wait for the end of all processes `but` one, and return their exit statuses."""
        waited = [child for child in self.children if child is not but]
        self.until(lambda: all(child.poll() is not None for child in waited), what, seconds, may_end=True)
        return [child.returncode for child in waited]

    def until_step(self, step: int) -> None:
        """Wait until `step` is done."""
        self.until(lambda: self.steps_done() >= step, f"do step {step}")

    def until_trained(self) -> int:
        """Wait until these processes have done a step; return which they went on from, ValueError if they disagree."""
        self.until(self.steps_trained, "do a step after its start")
        steps = {
            int(step)
            for child in self.children
            for step in re.findall(r"Going on from step (\d+)\.", child.read(".out"))
        }
        if len(steps) > 1:
            raise ValueError(f"processes of one run go on from steps {sorted(steps)}")
        return steps.pop() if steps else 0

    def steps_trained(self) -> int:
        """Return how many steps the processes that were started last have done."""
        return len({step for child in self.children for step in re.findall(r"(?m)^step +(\d+)/", child.read(".out"))})

    def steps_done(self) -> int:
        """Return the last step with a loss, 0 if there is none, from the end of the file: it is asked often."""
        path = self.path / "metrics.jsonl"
        tail = path.read_bytes()[-4096:] if path.exists() else b""  # more than ten lines
        found = [re.match(rb'\{"step": (\d+),.*"loss"', line) for line in tail.split(b"\n")[:-1]]
        return max((int(match[1]) for match in found if match), default=0)

    def lines(self) -> list[Line]:
        """Return the whole lines of metrics.jsonl, [] if there is none; ValueError if one is not JSON."""
        path = self.path / "metrics.jsonl"
        return read_lines(path.read_text(encoding="utf-8")) if path.exists() else []

    def complete(self) -> list[int]:
        """Return the steps of the checkpoints that were written to their end, oldest first."""
        return sorted(int(path.name) for path in self.checkpoints.glob("*") if path.name.isdigit())

    def newest(self) -> int:
        """Return the step of the newest complete checkpoint, 0 if there is none."""
        return max(self.complete(), default=0)

    def unfinished(self) -> list[Path]:
        """Return the checkpoints that are not complete: orbax renames STEP.orbax-checkpoint-tmp when all is there."""
        return [*self.checkpoints.glob("*.orbax-checkpoint-tmp*")]
