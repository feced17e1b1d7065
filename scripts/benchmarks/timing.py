"""Clocks for systems that are timed against each other, and a check that they compute the same."""

import os
import random
import statistics
import time

from ring_attention.doctor.timing import System
from ring_attention.testing import NAMES, relative_error

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


def both_clocks_in_turn(systems: list[System], repeats: int) -> dict[str, list[float]]:
    """Median (wall, CPU) seconds of each system, in rounds as `doctor.timing.seconds_in_turn` has them."""
    seconds: dict[str, list[list[float]]] = {system.name: [] for system in systems}
    order = random.Random(0)
    for _ in range(repeats):
        for system in order.sample(systems, len(systems)):
            start = [clock() for clock in CLOCKS.values()]
            system.run()
            seconds[system.name].append([clock() - begun for clock, begun in zip(CLOCKS.values(), start, strict=True)])
    return {name: [statistics.median(of) for of in zip(*times, strict=True)] for name, times in seconds.items()}
