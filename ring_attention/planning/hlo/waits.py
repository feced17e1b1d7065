"""What hides a transfer: a program's computation followed in its order, what stands beside each permute noted.

This is the only place that answers it. By the text alone the answer is what a permute stands beside; with a chip and a
mesh it is also how long a device waits.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

from ring_attention.hardware.chips import Chip
from ring_attention.planning.hlo.axes import PERMUTE, axes_of, place_of
from ring_attention.planning.hlo.compiled import Collective
from ring_attention.planning.hlo.peak_times import Estimate, PeakTimes
from ring_attention.planning.hlo.program import Instruction, Program

BESIDE_HOP, BESIDE_WORK, BESIDE_NOTHING = "hop", "other", "nothing"
"""What a permute stands beside: a hop (a loop over tiles, or a kernel), other work of its size, or nothing."""

_INSTANT = 1e-12
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|__cudnn\$fmha|[^"]*triton|[^"]*mosaic)')


@dataclasses.dataclass(eq=False)
class Flight:
    """A permute in flight, as it is found in the text of a program.

    Attributes:
      size: bytes that a device receives.
      axes: of the mesh that it goes along.
      link: name of the link it takes; flights with the same share it.
      seconds: that it takes the link, alone.
      asynchronous: whether it is started in one place and awaited in another.
      between: the least that what stands between the two takes.
      hops: loops and kernels that stand between the two.
      largest: bytes of the largest array that other work between the two makes.
      in_flight: bytes on their way to the device when it starts, its own included; 0 where it has no end of its own.
      exposed: of `seconds`, those in which the device waits.
      left: of `seconds`, those that the link still needs.
    """

    size: int
    axes: str = "?"
    link: tuple = ()
    seconds: float = 0.0
    asynchronous: bool = False
    between: Estimate = Estimate()
    hops: int = 0
    largest: int = 0
    in_flight: int = 0
    exposed: float = 0.0
    left: float = 0.0

    @property
    def beside(self) -> str:
        """What hides the permute, by the text: one of the names above."""
        if not self.asynchronous:
            return BESIDE_NOTHING
        return BESIDE_HOP if self.hops else BESIDE_WORK if self.largest >= self.size else BESIDE_NOTHING

    @classmethod
    def of(cls, item: Collective, chip: Chip, mesh_shape: dict[str, int], speed: float) -> "Flight":
        """Describe a permute over links of `speed` bytes a second."""
        axes, steps = axes_of(item, mesh_shape), [1]
        if item.between_slices:
            size = sum(array.bytes for array in item.arrays)
            return cls(size, axes, (axes,), size / chip.network)
        if axes in mesh_shape and chip.links > 1:
            size = mesh_shape[axes]
            places = [[place_of(device, mesh_shape)[axes] for device in pair] for pair in item.groups]
            forth = [(target - source) % size for source, target in places]
            steps = [step if 2 * step <= size else step - size for step in forth]
        link = () if chip.links == 1 else (axes, sum(steps) > 0)
        size = sum(array.bytes for array in item.arrays)
        return cls(size, axes, link, size * max(map(abs, steps)) / speed)


def follow_all(program: Program, flights: dict[str, Flight], times: PeakTimes | None = None) -> None:
    """Note in all flights, by name of their permute, what stands beside each; without `times` all work takes none."""
    where = {value: name for name in program.scheduled for value in program.computations[name]}
    for computation in sorted({where[name] for name in flights}):
        estimate = functools.partial(times.of, computation) if times else lambda _: Estimate()
        _follow(program.computations[computation].values(), flights, estimate)


def _follow(body: Iterable[Instruction], flights: dict[str, Flight], estimate: Callable) -> None:
    """Follow a computation from start to end. A flight whose end stands in another one ends where this one does."""
    clock = _Clock()
    waiting: dict[str, Estimate] = {}  # name of a flight -> work done when it started

    def end(name: str) -> None:
        if name in waiting:
            clock.arrive(flights[name], waiting.pop(name))

    for instruction in body:
        if flight := flights.get(instruction.name):
            flight.asynchronous = not _at_once(instruction)
            waiting[instruction.name] = clock.worked
            if instruction.opcode != PERMUTE:
                flight.in_flight = sum(flights[name].size for name in waiting)
            clock.start(flight)
            if not flight.asynchronous:
                end(instruction.name)
        elif instruction.opcode in (f"{PERMUTE}-done", "recv-done"):
            end(instruction.operands[0])
        else:
            clock.work(estimate(instruction))
            hop, made = _is_hop(instruction), _made(instruction)
            for name in waiting:
                flights[name].hops += hop
                flights[name].largest = max(flights[name].largest, made)
    for left in list(waiting):
        end(left)


def _is_hop(instruction: Instruction) -> bool:
    return instruction.opcode in ("while", "conditional") or _KERNEL.search(instruction.attributes) is not None


def _made(instruction: Instruction) -> int:
    """Find the bytes of the largest array that an instruction computes from others; filling an array does not count."""
    if instruction.opcode not in ("fusion", "convolution", "dot") or not instruction.operands:
        return 0
    return max((array.bytes for array in instruction.arrays), default=0)


def _at_once(instruction: Instruction) -> bool:
    return instruction.opcode == PERMUTE or '"is_sync":true' in instruction.attributes


class _Clock:
    """The work that is done so far, and what is on each link."""

    def __init__(self):
        self.worked = Estimate()
        self.links: dict[tuple, list[Flight]] = collections.defaultdict(list)

    def start(self, flight: Flight) -> None:
        if flight.seconds > _INSTANT:
            flight.left = flight.seconds
            self.links[flight.link].append(flight)

    def work(self, took: Estimate) -> None:
        self.worked = self.worked + took
        self._pass(took.seconds)

    def arrive(self, flight: Flight, before: Estimate) -> None:
        """Wait for a flight; `before` is the work that was done when it started."""
        shared, flight.between = self.links[flight.link], self.worked - before
        while flight in shared:
            self._pass(len(shared) * min(x.left for x in shared), waited_on=flight.link)

    def _pass(self, seconds: float, waited_on: tuple | None = None) -> None:
        for link, flights in self.links.items():
            left = seconds
            while flights and left > _INSTANT:
                each = min(left / len(flights), *(x.left for x in flights))
                left -= each * len(flights)
                for x in flights:
                    x.left -= each
                    x.exposed += each if link == waited_on else 0.0
                flights[:] = [x for x in flights if x.left > _INSTANT]
