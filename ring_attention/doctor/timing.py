"""Timing systems against each other on a machine that is never quite quiet."""

import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class System(NamedTuple):
    """Something to time: `run()` returns its results, finished; `natural` puts them as JAX would, in natural order."""

    name: str
    run: Callable[[], object]
    natural: Callable[[object], list] = lambda results: results


def rounds_within(systems: list[System], most: int, seconds: float) -> int:
    """How many rounds of all systems take so many seconds, at least 3 and at most `most`. Compiles them first."""
    for system in systems:
        system.run()
    start = time.perf_counter()
    for system in systems:
        system.run()
    return int(min(most, max(3, seconds / (time.perf_counter() - start))))


def seconds_in_turn(
    systems: list[System],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each system, one run of each in every round, in an order drawn anew for each round.

    In a fixed order each system would always run after the same other one, and pay for what that leaves behind: memory
    that was given back, threads that still spin. Ours in the contiguous layout lost a third of its speed that way
    (docs/experiments.md). `progress` is called after each run.
    """
    seconds = {system.name: [] for system in systems}
    order = random.Random(0)
    for _ in range(repeats):
        for system in order.sample(systems, len(systems)):
            start = clock()
            system.run()
            seconds[system.name].append(clock() - start)
            progress()
    return {name: statistics.median(times) for name, times in seconds.items()}
