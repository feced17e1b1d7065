"""One run after another, each trained to its end through the faults that are injected into it."""

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.verify.soak.run import EndedError, HangError, Run, Trainer
from scripts.verify.soak.verdicts import CORRUPTED, EXIT, HANG, LOSSES, MESSAGE, Line, Outcome


class TooLateError(Exception):
    """A run was done before a fault could be injected into it."""


class Chain:
    """Runs of one trainer, all with the losses of `reference`, a run that nothing disturbed.

    The run in hand is `run`, and what comes of the fault in hand goes to `outcome`; `ends` are the outcomes of runs
    that were trained to their end. `spare` is the path of a copy of the run, `startup` the seconds to the first step.
    """

    def __init__(self, trainer: Trainer, root: Path, *, deadline: float, rng: random.Random):
        self.trainer, self.root, self.deadline, self.rng = trainer, root, deadline, rng
        self.run, self.outcome, self.spare = Run(trainer, root / "undisturbed", deadline), Outcome(""), root
        self.ends: list[Outcome] = []
        self.reference: list[Line] = []
        self.start()
        if any(self._train_to_the_end()):
            raise EndedError(f"the undisturbed run failed: {self.run.children[0].last_words()}")
        self.reference, self._number, self._kills, self._done = self.run.lines(), 0, 0, 0

    def have_running(self, room: int) -> None:
        """Have a run that trains and has `room` more steps to do; one with fewer is trained to its end before."""
        if self.has_run and self.trainer.num_steps - self.run.steps_done() < room:
            self.finish()
        if not self.has_run:
            self._number, self._kills, self._done = self._number + 1, 0, 0
            self.run = Run(self.trainer, self.root / f"run-{self._number:03}", self.deadline)
            self.start()

    @property
    def has_run(self) -> bool:
        """Whether a run is in hand that neither ended nor went wrong."""
        return bool(self.run.children) and self._number > 0

    def train_a_while(self, least: int = 1, most: int = 10, checkpoints: int = 0) -> None:
        """Let some steps pass, and a part of one; raises TooLateError if it was almost the last."""
        self.run.until(lambda: len(self.run.complete()) >= checkpoints, "write checkpoints")
        self.run.until_step(self.run.steps_done() + self.rng.randint(least, most))
        time.sleep(self.rng.uniform(0, 0.1))
        if self.trainer.num_steps - self.run.steps_done() < 8:
            raise TooLateError

    def start(self) -> int:
        """Start the run in hand, wait for its first step, and return the step that it went on from."""
        began = time.monotonic()
        self.run.start()
        resumed = self.run.until_trained()
        self.startup = time.monotonic() - began
        return resumed

    def kill(self) -> None:
        """SIGKILL every process of the run."""
        self.run.kill()
        self.outcome.kills, self._kills = self.outcome.kills + 1, self._kills + 1
        self.take_in_death()

    def take_in_death(self) -> None:
        """Take in how far the run had come, that its losses were right up to there, and what may be lost.

        A checkpoint is written while training goes on, so the one that was begun last may not count yet: at most an
        interval lies between it and the one before, and at most another was trained beyond it.
        """
        done, interval, newest = self.run.steps_done(), self.trainer.checkpoint_every, self.run.newest()
        if done == self.trainer.num_steps:
            raise TooLateError
        if done > self._done:
            begun = max([newest, *(int(path.name.partition(".")[0]) for path in self.run.unfinished())])
            self.outcome.step, self._done, self.outcome.bound = done, done, interval + min(interval, begun - newest)
        self.outcome.require_lines(self.run.lines(), self.reference)

    def restart(self, allowed: Sequence[int] = ()) -> int:
        """Start the same command again; return the step that it went on from, the newest or one of `allowed`."""
        allowed = allowed or [self.run.newest()]
        try:
            resumed = self.start()
        except EndedError as error:
            raise ValueError(f"the run cannot go on with its folder: {error}") from error
        self.require_resumed(self.run, resumed, allowed, self._done)
        self._done = 0
        return resumed

    def require_resumed(self, run: Run, resumed: int, allowed: Sequence[int], done: int) -> None:
        """Require that a run which had done `done` steps went on from an allowed one, with the right losses."""
        found = f"went on from step {resumed}, not {' or '.join(map(str, allowed))}"
        self.outcome.require(resumed in allowed, CORRUPTED, found)
        self.outcome.require_lost(done, resumed)
        self.outcome.require_lines(run.lines(), self.reference)

    @contextlib.contextmanager
    def copied(self, path: Path) -> Iterator[Run]:
        """Freeze the run and copy its folder as it lies on the disk; what runs on the copy is killed in the end."""
        self.run.signal(signal.SIGSTOP)
        copy = Run(self.trainer, path, self.deadline)
        try:
            shutil.copytree(self.run.path, path, dirs_exist_ok=True)
            self.outcome.step = copy.steps_done()
            yield copy
        finally:
            copy.kill()
            self.run.signal(signal.SIGCONT)

    def require_exit(self, run: Run, codes: list[int], *allowed: int) -> None:
        """Require that every exit status is one of `allowed`."""
        words = f"ended with {codes}, not {' or '.join(map(str, allowed))}: {run.children[0].last_words()}"
        self.outcome.require(set(codes) <= set(allowed), EXIT, words)

    def require_one_line(self, run: Run, *words: str) -> None:
        """Require that stderr has one line of train.py's errors, and that it holds `words`."""
        errors = [line for line in run.children[0].read(".err").splitlines() if line.startswith("train.py: error: ")]
        self.outcome.require(len(errors) == 1, MESSAGE, f"{len(errors)} lines of error on stderr, not one")
        for word in words:
            self.outcome.require(word.lower() in " ".join(errors).lower(), MESSAGE, f"{word!r} is missing in {errors}")

    def finish(self) -> None:
        """Train the run in hand, alive or dead, to its end and compare it, all of it, with the reference."""
        fault, self.outcome = self.outcome, Outcome("end of a run", run=self.run.path.name, kills=self._kills)
        with self.problems_counted():
            if self.run.is_dead():
                self.run.start()
            self.require_exit(self.run, self._train_to_the_end(), 0)
            lines = self.run.lines()
            self.outcome.require_lines(lines, self.reference)
            missing = f"{len(self.reference) - len(lines)} lines are missing at the end"
            self.outcome.require(len(lines) == len(self.reference), LOSSES, missing)
        self.outcome.step = self.run.steps_done()
        self.ends.append(self.outcome)
        self.outcome = fault
        self.abandon()

    @contextlib.contextmanager
    def problems_counted(self) -> Iterator[None]:
        """Count what is raised as a problem of its sort."""
        try:
            yield
        except (HangError, EndedError, ValueError) as error:
            self.outcome.problems.append(({HangError: HANG, EndedError: EXIT}.get(type(error), CORRUPTED), str(error)))

    def abandon(self) -> None:
        """Kill what runs and leave the folder as it is; the next fault gets a new run."""
        self.run.kill()
        self.run.children = []

    def _train_to_the_end(self) -> list[int]:
        """Wait until the last step is done, where every step has the deadline; return the exit statuses."""
        while (done := self.run.steps_done()) < self.trainer.num_steps:
            self.run.until_step(done + 1)
        return self.run.codes("end")
