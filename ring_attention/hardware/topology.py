"""Pods by name: how many devices, of which chip, wired how. Nothing is compiled or asked for."""

import dataclasses
import math
import re

from ring_attention.checks import ConfigError, require_field
from ring_attention.hardware.chips import CHIPS, Chip
from ring_attention.hardware.reach import KernelRate, Reach, kernel_rate, reach_of

_NAME = re.compile(r"(?:(\d+)x)?([^:]*):?(.*)")
_SHAPE = re.compile(r"\d+(x\d+)*")
_SIDES = {"v3": 2, "v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_TWO_CORES = ("v3", "tpu7x")  # on a chip, each a device
_EXAMPLES = {2: "16x16", 3: "8x8x8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A pod, a slice of one, or several slices that only the data-centre network joins.

    Attributes:
      name: "v5e:16x16", "2xv5e:16x16" for two such slices, or "h100:4x8" for 4 hosts with 8 GPUs each.
      chip: what its devices are.
      sides: of a slice's grid of TPU devices (the last of v3 and tpu7x: the two cores of a chip); of GPUs, hosts and
        how many each has, which for gb200 are racks.
      slices: how many of them.
      measured: what programs were measured to reach of the chip; None where nothing was.
      measured_kernel: the rate of attention that was measured on it, whatever the kernel.
    """

    name: str
    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1
    measured: Reach | None = None
    measured_kernel: KernelRate | None = None

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.slices * math.prod(self.sides)

    @property
    def slice_name(self) -> str:
        """The name of one of the slices."""
        return self.name.removeprefix(f"{self.slices}x")

    @property
    def domain(self) -> int:
        """The number of devices that links join: of a TPU's slice, or of a GPU's host."""
        return math.prod(self.sides) if self.tpu else self.sides[-1]

    @property
    def reach(self) -> Reach:
        """What programs reach of the chip's published figures: measured, or of the table."""
        return self.measured or reach_of(self.chip)

    @property
    def reached(self) -> Chip:
        """The chip with what programs reach of its figures, flops that of dense layers."""
        chip, reach = self.chip, self.reach
        return dataclasses.replace(
            chip,
            flops=chip.flops * reach.matmul,
            memory_bandwidth=chip.memory_bandwidth * reach.memory,
            link=chip.link * reach.link,
            network=chip.network * reach.network,
            host_link=chip.host_link * reach.host_link,
        )

    def kernel_rate(self, kernel: str, head_dim: int) -> KernelRate:
        """How fast an attention kernel is: as measured, or by the table."""
        return self.measured_kernel or kernel_rate(self.chip, kernel, head_dim)

    @property
    def tpu(self) -> bool:
        """Whether the devices are TPUs, in a grid."""
        return self.chip.platform == "tpu"

    def box(self, devices: int) -> tuple[int, ...]:
        """Find the sides of the most cubic box of the grid with so many devices; all in a line if there is none."""
        boxes = [sides for sides in _divisions(self.sides, devices)]
        return min(boxes, key=lambda sides: (max(sides), sides), default=(devices,))

    def wraps(self, side: int) -> bool:
        """Whether a line of so many TPUs along the grid closes to a circle: a whole side of 16 on v5e and v6e, or
        one of a multiple of 4 on the others (Google's pages of each).
        """
        return side in self.sides and (side % 16 == 0 if self.chip.name in ("v5e", "v6e") else side % 4 == 0)


def find_topology(name: str) -> Topology:
    """Find a pod by its name, such as "v5e:16x16" or, of two such slices, "2xv5e:16x16".

    Raises:
      ConfigError: for a chip that is not known, or a shape that such pods do not have.
    """
    slices, word, shape = _NAME.fullmatch(name.replace("\n", " ")).groups()
    known = ", ".join(CHIPS)
    require_field(word in CHIPS, "topology", name, f"{word!r} is no chip that is known here", f"choose one of {known}")
    sides = _SIDES.get(word, 2)
    example = f"{word}:{_EXAMPLES[sides]}" if word in _SIDES else f"{word}:4x8 for 4 hosts of 8 GPUs"
    numbers = tuple(int(side) for side in shape.split("x")) if _SHAPE.fullmatch(shape) else ()
    if len(numbers) != sides or 0 in numbers:
        raise ConfigError(f"topology={name!r}: needs {sides} positive sides; write it like {example}")
    if slices is not None and (word not in _SIDES or not int(slices)):
        need = "is at least 1" if word in _SIDES else "is for TPUs; the first side counts a GPU's hosts"
        raise ConfigError(f"topology={name!r}: {slices}x, a number of slices, {need}; write it like {example}")
    sides = (*numbers, 2) if word in _TWO_CORES else numbers
    return Topology(name=name, chip=CHIPS[word], sides=sides, slices=int(slices or 1))


def _divisions(sides: tuple[int, ...], devices: int):
    """List the sides that divide these and multiply to so many devices."""
    if not sides:
        if devices == 1:
            yield ()
        return
    for side in range(1, min(sides[0], devices) + 1):
        if sides[0] % side == 0 and devices % side == 0:
            for rest in _divisions(sides[1:], devices // side):
                yield (side, *rest)
