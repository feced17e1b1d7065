"""Processes that are meant to die: started with a log, watched with a deadline, killed by the harness at the latest."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
POLL = 0.005  # seconds; a checkpoint of a tiny model is written in a tenth of one
STACKS = 10.0  # seconds that a process gets to write down where its threads are
_PR_SET_PDEATHSIG = 1
_ASK_KERNEL = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):  # it may have died before the kernel was asked
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Before a command: has the kernel kill it when the harness dies, however that comes about. A `preexec_fn` would do it
between fork and exec, which JAX, being multithreaded, warns of where it is loaded."""


class HangError(Exception):
    """A process did not do in time what it had to; the stacks of its threads are in its log."""


class EndedError(Exception):
    """A process ended by itself where it had to go on."""


class TooLateError(Exception):
    """A run was done before a fault could be injected into it."""


class Child:
    """One process. Its stdout goes to `log` + ".out", its stderr to `log` + ".err"."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path | None = None):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [*_dying_with_this_process(), *command],
                env=dict(env) | {"PYTHONFAULTHANDLER": "1"},  # stacks go to stderr on a fatal signal
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C is for the harness, which then ends its children
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit status, -N after signal N, None while it runs."""
        return self._process.poll()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """What it has complained of so far."""
        return self._err.read_text(encoding="utf-8", errors="replace")

    @property
    def last_words(self) -> str:
        """The last line on stderr, and where the rest is."""
        lines = self.stderr.strip().splitlines()
        return f"{lines[-1][:300] if lines else 'nothing on stderr'} ({self._err})"

    @property
    def where(self) -> str:
        """Where its main thread was when it wrote its stacks, and where the rest is."""
        _, _, main = self.stderr.rpartition("(most recent call first):")  # faulthandler writes the main thread last
        places = [line.strip() for line in main.splitlines() if line.startswith("  File ")]
        return f"{places[0] if places else 'no stack'} ({self._err})"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended does not mind."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def write_stacks_and_die(self) -> None:
        """Have Python's faulthandler write where every thread is to the log, then SIGKILL."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGILL)  # not SIGABRT, which train.py takes for JAX's way to end a process
        try:
            self._process.wait(STACKS)
        except subprocess.TimeoutExpired:
            self.kill()


class Life:
    """The processes of a run between one start and the next."""

    def __init__(self, children: Sequence[Child]):
        self.children = list(children)

    @property
    def stdout(self) -> str:
        """What all have printed so far."""
        return "".join(child.stdout for child in self.children)

    @property
    def stderr(self) -> str:
        """What all have complained of so far."""
        return "".join(child.stderr for child in self.children)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all."""
        for child in self.children:
            child.signal(number)

    def freeze(self) -> None:
        """Stop all in what they do, so that the instant can be looked at."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let all go on."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL all."""
        self.signal(signal.SIGKILL)
        for child in self.children:
            child.kill()

    def until(self, happened: Callable[[], T], what: str, seconds: float) -> T:
        """Wait for `happened()` to be true, and return it.

        Args:
          happened: asked every few milliseconds.
          what: the children are to do, for the message.
          seconds: that they have.

        Raises:
          HangError: if they took longer; by then they have written their stacks and are dead.
          EndedError: if one of them ended before.
        """
        deadline = time.monotonic() + seconds
        while True:
            gone = [child for child in self.children if child.code is not None]
            if result := happened():  # asked after the look at the children: what they did last counts
                return result
            if gone:
                raise EndedError(f"exit status {gone[0].code} before it could {what}: {gone[0].last_words}")
            if time.monotonic() > deadline:
                raise self._hang(what, seconds)
            time.sleep(POLL)

    def codes(self, what: str, seconds: float, but: Sequence[Child] = ()) -> list[int]:
        """Wait for the end of all `but` some and return their exit statuses; raises HangError after `seconds`."""
        waited_for = [child for child in self.children if child not in but]
        deadline = time.monotonic() + seconds
        while any(child.code is None for child in waited_for):
            if time.monotonic() > deadline:
                raise self._hang(what, seconds)
            time.sleep(POLL)
        return [child.code for child in waited_for]

    def _hang(self, what: str, seconds: float) -> HangError:
        running = [child for child in self.children if child.code is None]
        for child in running:
            child.write_stacks_and_die()
        return HangError(f"did not {what} in {seconds:g} s: {running[0].where if running else 'all have ended'}")


def _dying_with_this_process() -> list[str]:
    return [sys.executable, "-I", "-S", "-c", _ASK_KERNEL, str(os.getpid())] if sys.platform == "linux" else []
