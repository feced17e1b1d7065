"""What every fault is given."""

import contextlib
import dataclasses
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .chain import Chain
from .life import Child, Life, TooLateError
from .trainer import Folder, resumed_step, steps_trained
from .verdicts import CORRUPTED, EXIT, MESSAGE, Outcome

SIGTERM_SECONDS = 30.0
"""A preempted run has so long to write its checkpoint."""

PEERS_SECONDS = 60.0
"""The other processes have so long to see that one is lost."""

NEAR_THE_END = 8
"""Steps that a run must have left for what is done to it to matter."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """A run that trains, dice, and where to write down what came of the fault.

    Attributes:
      chain: has the run.
      rng: decides whatever is left to chance.
      outcome: takes in what happens.
      spare: path of a folder that is not there yet, for a copy of the run.
    """

    chain: Chain
    rng: random.Random
    outcome: Outcome
    spare: Path

    def train_a_while(self, least: int = 1, most: int = 10) -> None:
        """Let some steps pass, and a part of one; raises TooLateError if it was almost the last."""
        self.chain.train_on(self.rng.randint(least, most))
        time.sleep(self.rng.uniform(0, 0.1))
        if self.chain.steps_left < NEAR_THE_END:
            raise TooLateError("the run is almost done")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the run while something is done with a copy of it."""
        self.chain.life.freeze()
        try:
            yield
        finally:
            self.chain.life.thaw()

    @contextlib.contextmanager
    def started(self, folder: Path, **how) -> Iterator[Life]:
        """Start the command on another folder, as `Trainer.start` does; killed in the end."""
        life = self.chain.trainer.start(folder, **how)
        try:
            yield life
        finally:
            life.kill()

    def terminate(self, children: Sequence[Child]) -> list[int]:
        """SIGTERM to some processes of the run, and wait for the end of all; returns their exit statuses."""
        began = time.monotonic()
        for child in children:
            child.signal(signal.SIGTERM)
        codes = self.chain.life.codes("end after SIGTERM", SIGTERM_SECONDS)
        self.outcome.notes.append(f"ended in {time.monotonic() - began:.1f} s")
        self.chain.take_in_death(self.outcome)
        return codes

    def terminate_and_restart(self, children: Sequence[Child]) -> None:
        """SIGTERM to some processes of the run while it trains: all end, and not a step is lost."""
        self.require_exit(self.chain.life, self.terminate(children), 128 + signal.SIGTERM)
        self.outcome.bound = 0
        self.chain.restart(self.outcome)

    def require_exit(self, life: Life, codes: list[int], *allowed: int) -> None:
        """A problem unless every exit status is one of `allowed`."""
        words = f"ended with {codes}, not {' or '.join(map(str, allowed))}: {life.children[0].last_words}"
        self.outcome.require(set(codes) <= set(allowed), EXIT, words)

    def require_one_line(self, stderr: str, *words: str) -> None:
        """A problem unless stderr has one line of train.py's errors, and it holds `words`."""
        errors = [line for line in stderr.splitlines() if line.startswith("train.py: error: ")]
        self.outcome.require(len(errors) == 1, MESSAGE, f"{len(errors)} lines of error on stderr, not one")
        text = " ".join(errors)
        for word in words:
            self.outcome.require(word.lower() in text.lower(), MESSAGE, f"{word!r} is missing in {text[:300]!r}")

    def require_going_on(self, life: Life, copy: Folder, done: int) -> None:
        """Problems unless a copy of the run, just started, goes on from its newest checkpoint with the right losses."""
        newest = copy.newest()
        life.until(lambda: steps_trained(life), "go on", self.chain.deadline)
        resumed = resumed_step(life)
        found = f"went on from step {resumed} where checkpoint {newest} was the newest"
        self.outcome.require(resumed == newest, CORRUPTED, found)
        self.outcome.require_lost(done, resumed)
        self.outcome.require_lines(copy.lines(), self.chain.reference)
        self.outcome.notes.append(f"went on from {resumed}, {self.outcome.lost} lost")
