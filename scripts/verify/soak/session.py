"""Faults in shuffled rounds until the time is over, and what came of them."""

import collections
import dataclasses
import itertools
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from scripts.verify.soak.chain import Chain, TooLateError
from scripts.verify.soak.faults import FAULTS, SHARED
from scripts.verify.soak.run import Trainer
from scripts.verify.soak.verdicts import SORTS, Outcome


class Session:
    """A soak: `outcomes` of the faults, and of the runs that were trained to their `ends`."""

    def __init__(self, trainers: Mapping[int, Trainer], out: Path, *, seed: int, deadline: float, kinds: Sequence[str]):
        """Prepare faults of some `kinds` for `trainers`, by number of processes; `out` takes all that runs leave."""
        self.trainers, self.out, self.kinds, self.deadline = trainers, out, list(kinds), deadline
        self.rng, self.outcomes, self.ends, self.seconds = random.Random(seed), [], [], 0.0

    def run(
        self, seconds: float = math.inf, rounds: int | None = None, tell: Callable[[Outcome], object] = lambda _: None
    ) -> None:
        """Inject every kind once a round, `tell` each outcome, and train the runs in hand to their end.

        Faults of one process come first, then those of several; each have half of the `seconds`, which begin when the
        run that nothing disturbs is trained.
        """
        began, groups = time.monotonic(), {}
        for kind in self.kinds:
            groups.setdefault(max(self.trainers) if kind in SHARED else 1, []).append(kind)
        for processes, kinds in sorted(groups.items()):
            chain = Chain(self.trainers[processes], self.out / f"of_{processes}", deadline=self.deadline, rng=self.rng)
            until = time.monotonic() + seconds / len(groups)
            try:
                for kind in self._shuffled(kinds, rounds):
                    if time.monotonic() > until:
                        break
                    self.seconds = time.monotonic() - began
                    self._inject(chain, kind)
                    tell(self.outcomes[-1])
                if chain.has_run:
                    chain.finish()
            finally:
                chain.abandon()
            self.ends += chain.ends
        self.seconds = time.monotonic() - began

    def _shuffled(self, kinds: list[str], rounds: int | None) -> Iterator[str]:
        for _ in itertools.count() if rounds is None else range(rounds):
            yield from self.rng.sample(kinds, len(kinds))

    def _inject(self, chain: Chain, kind: str) -> None:
        for attempt in itertools.count():
            outcome = chain.outcome = Outcome(kind, seconds=self.seconds)
            chain.spare = self.out / "copies" / f"{len(self.outcomes):04}-{kind}-{attempt}"
            with chain.problems_counted():
                try:
                    chain.have_running(room=30)
                    outcome.run, outcome.step = chain.run.path.name, chain.run.steps_done()
                    FAULTS[kind](chain)
                except TooLateError:
                    chain.finish()
                    continue
            break
        if outcome.problems:
            chain.abandon()  # what comes after would be told of this one's folder
        else:
            shutil.rmtree(chain.spare, ignore_errors=True)
        self.outcomes.append(outcome)

    def as_json(self) -> dict:
        """Return all figures, fit for JSON."""
        outcomes = self.outcomes + self.ends
        sorts = collections.Counter(sort for outcome in outcomes for sort, _ in outcome.problems)
        return {
            "seconds": self.seconds,
            "faults": len(self.outcomes),
            "kills_survived": sum(outcome.kills for outcome in self.outcomes if not outcome.problems),
            "most_kills_of_one_run": max((end.kills for end in self.ends if not end.problems), default=0),
            "most_steps_lost": max((outcome.lost or 0 for outcome in self.outcomes), default=0),
            "runs_to_the_end": len(self.ends),
            "problems": sum(sorts.values()),
            "by_sort": {sort: sorts[sort] for sort in SORTS},
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        }

    def table(self) -> Table:
        """Return a row for each kind of fault."""
        table = Table("kind", title="Faults", caption="lost: the most steps done again; bound: the most allowed")
        for name in ("injected", "as promised", "SIGKILLs", "lost", "bound"):
            table.add_column(name, justify="right")
        for kind in self.kinds:
            found = [outcome for outcome in self.outcomes if outcome.kind == kind]
            good, kills = sum(not o.problems for o in found), sum(o.kills for o in found)
            most = [max((getattr(o, name) or 0 for o in found), default=0) for name in ("lost", "bound")]
            style = None if good == len(found) else "bold red"
            table.add_row(kind, *map(str, (len(found), good, kills, *most)), style=style)
        return table


def line_of(outcome: Outcome) -> str:
    """Return one outcome in one line, when, what, and what came of it, and a line for each problem."""
    minutes, seconds = divmod(int(outcome.seconds), 60)
    text = f"{minutes:3}:{seconds:02}  {outcome.kind:18} at step {outcome.step:4}  {'; '.join(outcome.notes)}"
    return escape(text) + "".join(f"\n        [bold red]{sort}: {escape(w)}[/]" for sort, w in outcome.problems)
