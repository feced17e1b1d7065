"""Timing systems against each other on a machine that is never quite quiet."""

import os
import random
import statistics
import time
from collections.abc import Callable

from ring_attention.testing import NAMES, relative_error
from scripts.benchmarks.baselines import System

CLOCKS = {"wall": time.perf_counter, "cpu": lambda: time.process_time() / os.cpu_count()}
"""Seconds on the wall, or those that all threads together computed, shared out over the cores."""

LARGEST_DISAGREEMENT = 1e-4
"""Relative difference between two systems' float32 results above which one of them computes something else."""


def require_agreement(systems: list[System]) -> None:
    """Raise RuntimeError unless all systems give what the first gives. Compiles and warms them up."""
    want = systems[0].natural(systems[0].run())
    for system in systems[1:]:
        got = system.natural(system.run())
        for name, g, w in zip(NAMES, got, want, strict=False):  # forward alone has no gradients
            error = relative_error(g, w)
            if not error <= LARGEST_DISAGREEMENT:
                raise RuntimeError(f"{system.name} and {systems[0].name} differ in {name} by {error:.1e}, relatively")


def seconds_in_turn(
    systems: list[System], repeats: int, clock: Callable[[], float], progress: Callable[[], None] = lambda: None
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
