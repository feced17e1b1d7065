"""What a device waits for its transfers: a program's computation followed on a clock."""

import collections
import dataclasses

from ring_attention.hardware.chips import Chip
from ring_attention.planning.hlo.axes import PERMUTE, axes_of, place_of
from ring_attention.planning.hlo.compiled import Collective
from ring_attention.planning.hlo.peak_times import Estimate, PeakTimes
from ring_attention.planning.hlo.program import Instruction

_INSTANT = 1e-12


@dataclasses.dataclass(eq=False)
class Flight:
    """A permute on its way.

    Attributes:
      axes: of the mesh that it goes along.
      link: name of the link it takes; flights with the same share it.
      seconds: that it takes the link, alone.
      asynchronous: whether it is started in one place and awaited in another.
      between: the least that what stands between the two takes.
      exposed: of `seconds`, those in which the device waits.
      left: of `seconds`, those that the link still needs.
    """

    axes: str
    link: tuple
    seconds: float
    asynchronous: bool = False
    between: Estimate = Estimate()
    exposed: float = 0.0
    left: float = 0.0

    @classmethod
    def of(cls, item: Collective, chip: Chip, mesh_shape: dict[str, int], speed: float) -> "Flight":
        """Of a permute over links of `speed` bytes a second."""
        axes, steps = axes_of(item, mesh_shape), [1]
        if axes in mesh_shape and chip.links > 1:
            size = mesh_shape[axes]
            places = [[place_of(device, mesh_shape)[axes] for device in pair] for pair in item.groups]
            forth = [(target - source) % size for source, target in places]
            steps = [step if 2 * step <= size else step - size for step in forth]
        link = () if chip.links == 1 else (axes, sum(steps) > 0)
        return cls(axes, link, sum(array.bytes for array in item.arrays) * max(map(abs, steps)) / speed)


def follow(times: PeakTimes, name: str, flights: dict[str, Flight]) -> None:
    """Follow the computation `name` from start to end, and note in its flights, by name, what was between and exposed.

    One whose end stands in another computation ends where this one does.
    """
    clock = _Clock()
    waiting: dict[str, Estimate] = {}  # name of a flight -> work done when it started

    def end(name: str) -> None:
        if name in waiting:
            clock.arrive(flights[name], waiting.pop(name))

    for instruction in times.program.computations[name].values():
        if flight := flights.get(instruction.name):
            flight.asynchronous = not _at_once(instruction)
            waiting[instruction.name] = clock.worked
            clock.start(flight)
            if not flight.asynchronous:
                end(instruction.name)
        elif instruction.opcode == f"{PERMUTE}-done":
            end(instruction.operands[0])
        else:
            clock.work(times.of(name, instruction))
    for left in list(waiting):
        end(left)


def _at_once(instruction: Instruction) -> bool:
    return instruction.opcode == PERMUTE or '"is_sync":true' in instruction.attributes


class _Clock:
    """Work done so far, and what is on each link."""

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
