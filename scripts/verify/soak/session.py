"""Faults in shuffled rounds until the time is over."""

import contextlib
import itertools
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import damage, disk, elsewhere, kills, rivals
from .chain import Chain, sort_of
from .life import EndedError, HangError, TooLateError
from .scene import Scene
from .trainer import SEVERAL, Trainer
from .verdicts import Outcome


class Fault(NamedTuple):
    """A kind of fault: what it does, to a run of so many processes that has so many steps before it."""

    inject: Callable[[Scene], None]
    processes: int = 1
    room: int = 30


FAULTS = {
    "kill": Fault(kills.kill),
    "kill_saving": Fault(kills.kill_saving),
    "kill_saved": Fault(kills.kill_saved),
    "kill_starting": Fault(kills.kill_starting),
    "terminate": Fault(kills.terminate),
    "terminate_starting": Fault(kills.terminate_starting),
    "flip": Fault(damage.flip),
    "truncate": Fault(damage.truncate),
    "disk_full": Fault(disk.disk_full),
    "second_run": Fault(rivals.second_run),
    "other_mesh": Fault(elsewhere.other_mesh),
    "not_finite": Fault(elsewhere.not_finite),
    "lose_process": Fault(rivals.lose_process, processes=SEVERAL),
    "freeze_process": Fault(rivals.freeze_process, processes=SEVERAL),
    "terminate_process": Fault(rivals.terminate_process, processes=SEVERAL),
}


class Session:
    """A soak: the runs, and what came of every fault."""

    def __init__(
        self,
        trainers: Mapping[int, Trainer],
        out: Path,
        *,
        seed: int,
        deadline: float,
        kinds: Sequence[str] = tuple(FAULTS),
        tell: Callable[[Outcome], None] = lambda outcome: None,
    ):
        """Prepare.

        Args:
          trainers: the commands under test, by the number of processes that share a run.
          out: a folder for all that the runs leave.
          seed: of the faults' order, moments and places.
          deadline: seconds that processes may do nothing that can be seen.
          kinds: names from FAULTS.
          tell: called with each outcome.
        """
        self.outcomes: list[Outcome] = []
        self.kinds, self._trainers = list(kinds), trainers
        self._out, self._deadline, self._tell = out, deadline, tell
        self._rng = random.Random(seed)
        self._chains: dict[int, Chain] = {}
        self._began = time.monotonic()

    @property
    def ends(self) -> list[Outcome]:
        """What came of the runs that were trained to their end."""
        return [end for chain in self._chains.values() for end in chain.ends]

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints, the same for all trainers."""
        (steps,) = {trainer.checkpoint_every for trainer in self._trainers.values()}
        return steps

    @property
    def most_kills(self) -> int:
        """SIGKILLs that one run survived, the most."""
        return max((chain.most_kills for chain in self._chains.values()), default=0)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def run(self, *, seconds: float = math.inf, rounds: int | None = None) -> None:
        """Inject faults for so long, every kind once a round, then train the runs in hand to their end.

        Raises:
          HangError, EndedError: where not even an undisturbed run comes to its end.
        """
        with contextlib.closing(self):
            for kind in self._shuffled(rounds):
                if self.seconds > seconds:
                    break
                self._inject(kind)
            for chain in self._chains.values():
                self._rest_all_but(chain)
                if chain.has_run:
                    chain.finish()

    def close(self) -> None:
        """Kill whatever still runs."""
        for chain in self._chains.values():
            chain.abandon()

    def _shuffled(self, rounds: int | None) -> Iterator[str]:
        """Every kind once a round, those of as many processes together: to change between them costs a start."""
        for _ in itertools.count() if rounds is None else range(rounds):
            kinds = self._rng.sample(self.kinds, len(self.kinds))
            several_first = self._rng.random() < 0.5
            yield from sorted(kinds, key=lambda kind: FAULTS[kind].processes, reverse=several_first)

    def _inject(self, kind: str) -> None:
        """Inject one fault and take in what came of it."""
        fault = FAULTS[kind]
        chain = self._chain(fault.processes)
        for attempt in itertools.count():
            outcome = Outcome(kind, seconds=self.seconds)
            spare = self._out / "copies" / f"{len(self.outcomes):04}-{kind}-{attempt}"
            try:
                chain.have_running(fault.room, outcome)
                outcome.run, outcome.step = chain.folder.path.name, chain.folder.steps_done()
                fault.inject(Scene(chain, self._rng, outcome, spare))
            except TooLateError:
                chain.finish()
                continue
            except (HangError, EndedError, ValueError) as error:
                outcome.problems.append((sort_of(error), str(error)))
            break
        if outcome.problems:
            chain.abandon()  # what comes after would be told of this one's folder
        else:
            shutil.rmtree(spare, ignore_errors=True)
        self.outcomes.append(outcome)
        self._tell(outcome)

    def _chain(self, processes: int) -> Chain:
        """The runs of so many processes, the only ones that are not at rest; the first time with a reference."""
        if processes in self._chains:
            self._rest_all_but(self._chains[processes])
            return self._chains[processes]
        chain = Chain(self._trainers[processes], self._out / f"of_{processes}", deadline=self._deadline)
        self._chains[processes] = chain
        self._rest_all_but(chain)
        chain.train_undisturbed()
        return chain

    def _rest_all_but(self, chain: Chain) -> None:
        for other in self._chains.values():
            if other is not chain:
                other.rest()
