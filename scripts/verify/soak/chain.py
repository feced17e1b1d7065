"""One run after another, each trained to its end through the faults that are injected into it."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .life import EndedError, HangError, Life, TooLateError
from .trainer import Folder, Trainer, resumed_step, steps_trained
from .verdicts import CORRUPTED, EXIT, HANG, LOSSES, Line, Outcome


class UnusableError(EndedError):
    """A folder that the run could not go on with."""


class Chain:
    """Runs of one command, each in a folder of its own, all with the losses of a run that nothing disturbed.

    Attributes:
      reference: lines of the undisturbed run.
      folder: of the run in hand.
      life: its processes, dead or alive; None before the first.
      ends: what came of the runs that were trained to their end.
      most_kills: SIGKILLs that one run survived.
      startup: seconds from launch to the first step, the last time.
    """

    def __init__(self, trainer: Trainer, root: Path, *, deadline: float):
        """Prepare; `deadline` is how many seconds the processes may do nothing that can be seen."""
        self.trainer, self.deadline = trainer, deadline
        self._root, self._runs = root, 0
        self.folder = Folder(root / "undisturbed")
        self.reference: list[Line] = []
        self.life: Life | None = None
        self.ends: list[Outcome] = []
        self.most_kills, self._kills = 0, 0
        self.startup = 0.0
        self._done = 0  # the last step before what killed the run

    def train_undisturbed(self) -> None:
        """Make the reference; raises HangError or EndedError where not even that works."""
        self._launch_and_take_time()
        self._wait_for_the_end()
        codes = self.life.codes("end", self.deadline)
        if any(codes):
            raise EndedError(f"the undisturbed run ended with {codes}: {self.life.children[0].last_words}")
        self.reference, self.life = self.folder.lines(), None
        if self.folder.steps_done() != self.trainer.num_steps:
            raise EndedError(
                f"the undisturbed run ended with step {self.folder.steps_done()} of {self.trainer.num_steps}"
            )

    # --- What faults need ---------------------------------------------------------------------------------------------

    def have_running(self, room: int, outcome: Outcome) -> None:
        """Have a run that trains and has `room` more steps to do; one with fewer is trained to its end before.

        A run that was killed by `rest` goes on, and `outcome` takes in how.
        """
        if self.has_run and self.steps_left < room:
            self.finish()
        if self.has_run and self.is_dead:
            self.count_kill(outcome)
            self.restart(outcome)
        if not self.has_run:
            self._runs += 1
            self.folder = Folder(self._root / f"run-{self._runs:03}")
            self._kills = self._done = 0
            self._launch_and_take_time()

    @property
    def has_run(self) -> bool:
        """Whether a run is in hand."""
        return self.life is not None and self._runs > 0

    def rest(self) -> None:
        """SIGKILL the processes, so that they take no time from those of another chain."""
        if self.life is not None:
            self.life.kill()

    @property
    def is_dead(self) -> bool:
        """Whether no process of the run is left."""
        return all(child.code is not None for child in self.life.children)

    @property
    def steps_left(self) -> int:
        """Steps until the end of the run in hand."""
        return self.trainer.num_steps - self.folder.steps_done()

    def train_on(self, steps: int) -> None:
        """Wait until `steps` more are done."""
        self.until_step(self.folder.steps_done() + steps)

    def until_step(self, step: int) -> None:
        """Wait until `step` is done."""
        self.until(lambda: self.folder.steps_done() >= step, f"do step {step}")

    def until(self, happened: Callable[[], object], what: str) -> None:
        """Wait until `happened()` is true, as `Life.until` does."""
        self.life.until(happened, what, self.deadline)

    def launch(self) -> None:
        """Start the processes of the run in hand."""
        self.life = self.trainer.start(self.folder.path)

    def kill(self, outcome: Outcome) -> None:
        """SIGKILL every process of the run."""
        self.life.kill()
        self.count_kill(outcome)

    def count_kill(self, outcome: Outcome) -> None:
        """Take in that the run has died of SIGKILL."""
        outcome.kills += 1
        self._kills += 1
        self.take_in_death(outcome)

    def take_in_death(self, outcome: Outcome) -> None:
        """Take in how far the run had come, that its losses were right up to there, and what may be lost.

        A checkpoint is written while training goes on, so the one that was begun last may not count yet: at most an
        interval lies between it and the one before, and at most another was trained beyond it.
        """
        done, begun, newest = self.folder.steps_done(), self.folder.begun(), self.folder.newest()
        interval = self.trainer.checkpoint_every
        if done == self.trainer.num_steps:
            raise TooLateError("the run was done")
        if done > self._done:
            outcome.step = self._done = done
            outcome.beyond_begun = done - begun
            outcome.bound = interval + min(interval, begun - newest)
        outcome.require_lines(self.folder.lines(), self.reference)

    def restart(self, outcome: Outcome, allowed: Sequence[int] = ()) -> int:
        """Start the same command again, until it has done a step; see that it went on from where it should.

        Args:
          outcome: takes in the steps lost, and what is wrong.
          allowed: steps to go on from; the newest checkpoint's by default.

        Returns:
          the step that it went on from.

        Raises:
          HangError: if it takes too long.
          UnusableError: if it ends instead.
        """
        allowed = allowed or [self.folder.newest()]
        try:
            self._launch_and_take_time()
        except EndedError as error:
            raise UnusableError(str(error)) from error
        resumed = resumed_step(self.life)
        found = f"went on from step {resumed}, not {' or '.join(map(str, allowed))}"
        outcome.require(resumed in allowed, CORRUPTED, found)
        outcome.require_lost(self._done, resumed)
        outcome.require_lines(self.folder.lines(), self.reference)
        outcome.notes.append(f"went on from {resumed}, {outcome.lost} lost")
        self._done = 0
        if not outcome.problems:
            self.most_kills = max(self.most_kills, self._kills)
        return resumed

    def copy(self, target: Path) -> Folder:
        """Copy the run's folder as it lies on the disk at this instant; freeze or kill the run before."""
        shutil.copytree(self.folder.path, target, dirs_exist_ok=True)
        return Folder(target)

    # --- Ends ---------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Train the run in hand, alive or dead, to its end and compare it, all of it, with the reference."""
        outcome = Outcome("end of a run", run=self.folder.path.name)
        if self.is_dead:
            self.launch()
        try:
            self._wait_for_the_end()
            codes = self.life.codes("end", self.deadline)
            outcome.require(not any(codes), EXIT, f"ended with {codes}, not 0: {self.life.children[0].last_words}")
            lines = self.folder.lines()
            outcome.require_lines(lines, self.reference)
            missing = f"{len(self.reference) - len(lines)} lines are missing at the end"
            outcome.require(len(lines) == len(self.reference), LOSSES, missing)
        except (HangError, EndedError, ValueError) as error:
            outcome.problems.append((sort_of(error), str(error)))
        outcome.step = self.folder.steps_done()
        outcome.notes.append(f"{self._kills} SIGKILLs in it")
        self.ends.append(outcome)
        self.abandon()

    def abandon(self) -> None:
        """Kill what runs and leave the folder as it is; the next fault gets a new run."""
        self.rest()
        self.life = None

    def _wait_for_the_end(self) -> None:
        """Wait until the last step is done; every step has the deadline."""
        while (step := self.folder.steps_done()) < self.trainer.num_steps:
            self.until_step(step + 1)

    def _launch_and_take_time(self) -> None:
        """Start the processes and wait for their first step."""
        began = time.monotonic()
        self.launch()
        self.until(lambda: steps_trained(self.life), "do a step after its start")
        self.startup = time.monotonic() - began


def sort_of(error: Exception) -> str:
    """The sort of problem that an exception is."""
    return {HangError: HANG, EndedError: EXIT}.get(type(error), CORRUPTED)
