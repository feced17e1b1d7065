"""Reads a program compiled for a pod: what goes along which mesh axis, and how long each device waits for its ring."""

import collections
import dataclasses

from ring_attention.hardware.chips import Chip
from ring_attention.planning.hlo.axes import PERMUTE, axes_of
from ring_attention.planning.hlo.compiled import Collective, collectives_in
from ring_attention.planning.hlo.findings import kept_masks, whole_sequences
from ring_attention.planning.hlo.peak_times import PeakTimes
from ring_attention.planning.hlo.program import Instruction, Program
from ring_attention.planning.hlo.waits import BESIDE_HOP, BESIDE_NOTHING, BESIDE_WORK, Flight, follow_all
from ring_attention.planning.shares import Share

_LARGE = 2**20
"""Bytes of a transfer that is worth a warning; smaller ones, such as segment ids, arrive before anybody needs them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisTraffic:
    """All collectives of a program that are of one kind and go along the same mesh axes.

    Attributes:
      kind: one of `compiled.KINDS`.
      axes: such as "sp" or "fsdp+sp"; "?" where the devices are those of no axes of the mesh.
      instructions: how many of them the program has.
      runs: how often they run in one run of the program, in all; None for those in loops of unknown length, which are
        reported apart and whose bytes are those of one run of each.
      bytes: given to one device.
      sent: by one device; see `Collective.sent`.
    """

    kind: str
    axes: str
    instructions: int
    runs: int | None
    bytes: int
    sent: int

    def __str__(self) -> str:
        """Say all of it in one line."""
        runs = "runs unknown, in one" if self.runs is None else f"{self.runs} runs"
        return f"{self.kind} along {self.axes}: {runs}, {self.bytes} bytes received, {self.sent} sent"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """A collective-permute of a program's text. Bytes and seconds are those of one run.

    Attributes:
      name: of its instruction.
      phase: the pass it belongs to, "forward" or "backward"; "?" where the program does not say.
      axes: of the mesh that it goes along.
      bytes: that a device receives.
      runs: how often it runs in one run of the program; None in a loop of unknown length.
      asynchronous: whether it is started in one place and awaited in another.
      beside: what stands between the two, "hop", "other" work that is no smaller than what is sent, or "nothing".
      compute_seconds: the least that what stands between its start and its end takes; see `peak_times`.
      unknown_loops: loops of unknown length between the two, each of which counts as one turn.
      link_seconds: that its bytes take the link, alone.
      exposed_seconds: of these, those that a device spends waiting.
    """

    name: str
    phase: str
    axes: str
    bytes: int
    runs: int | None
    asynchronous: bool
    beside: str
    compute_seconds: float
    unknown_loops: int
    link_seconds: float
    exposed_seconds: float

    @property
    def hidden(self) -> bool:
        """Whether a device does not wait for the transfer at all."""
        return self.asynchronous and self.exposed_seconds <= 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """How many permutes in the text of a compiled program lie beside what; one in a loop counts once.

    Attributes:
      asynchronous: permutes that start in one place and are awaited in another.
      hidden: those between whose two places a hop is computed: a loop over tiles, or a kernel, stands there.
      beside_other_work: of the rest those between whose two places something is computed that is no smaller than what
        is sent, such as the merging of what a hop gave.
      synchronous: permutes that nothing else can run beside.
      exposed: those that a device can only wait for: synchronous ones and the rest.
      exposed_bytes: of those.
      bytes_in_flight: the most that is on its way to one device at any one time.
    """

    asynchronous: int
    hidden: int
    beside_other_work: int
    synchronous: int
    exposed: int
    exposed_bytes: int
    bytes_in_flight: int


def collectives_by_axis(text: str, mesh_shape: dict[str, int]) -> list[AxisTraffic]:
    """Add up what a compiled program sends along which axes, the most bytes first.

    Args:
      text: its `as_text()`.
      mesh_shape: axis -> size, in the order of the mesh: devices are numbered with the last one varying fastest. Of
        several slices of TPUs, the part of the mesh in one: the program is that of one slice.

    Raises:
      ValueError: if `text` is no compiled program, or one for another number of devices.
    """
    grouped = collections.defaultdict(list)
    for item in collectives_in(Program.parse(text)):
        grouped[item.kind, axes_of(item, mesh_shape), item.runs is None].append(item)
    rows = [
        AxisTraffic(
            kind=kind,
            axes=axes,
            instructions=len(items),
            runs=None if unknown else sum(item.runs for item in items),
            bytes=sum(item.bytes for item in items),
            sent=sum(item.sent for item in items),
        )
        for (kind, axes, unknown), items in grouped.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


def transfers(text: str, chip: Chip, mesh_shape: dict[str, int], *, bandwidth: float | None = None) -> list[Transfer]:
    """List the permutes of a compiled program, and how long a device waits for each.

    Every computation of the program is followed in the order of its text, on a clock. Instructions move it by the
    least that they can take (see `peak_times`), which is the hardest case for hiding. What is on a link at the same
    time shares its bandwidth evenly. Where a transfer is awaited that is not there yet, the clock moves to its arrival,
    and those seconds of the link's time are the exposed ones of all that share it; other links go on meanwhile. So
    `exposed_seconds` of all transfers of a computation add up to what a device waits in it: for K and V that start and
    end together, to what both take beyond the computation between.

    Transfers share a link if they go the same way along the same axes (TPU), or leave a device at all (GPU, which has
    one link, into the switch). On a TPU one that goes to the n-th neighbour takes n links, and each link carries n of
    them. Links are taken to be free where a computation begins, and other collectives to take no time.

    Args:
      text: its `as_text()`.
      chip: that it was compiled for.
      mesh_shape: as in `collectives_by_axis`.
      bandwidth: bytes a second of a hop one way; `chip.link` if None. A ring that crosses hosts goes at the pace of its
        slowest hop. What goes between slices of TPUs takes `chip.network`.
    """
    program, speed = Program.parse(text), chip.link if bandwidth is None else bandwidth
    permutes = _permutes(program)
    flights = {name: Flight.of(item, chip, mesh_shape, speed) for name, (item, _) in permutes.items()}
    follow_all(program, flights, PeakTimes(program, chip))
    return [
        Transfer(
            name=name,
            phase=_phase(instruction),
            axes=flight.axes,
            bytes=flight.size,
            runs=item.runs,
            asynchronous=flight.asynchronous,
            beside=flight.beside,
            compute_seconds=flight.between.seconds,
            unknown_loops=flight.between.unknown_loops,
            link_seconds=flight.seconds,
            exposed_seconds=flight.exposed,
        )
        for (name, (item, instruction)), flight in zip(permutes.items(), flights.values(), strict=True)
    ]


def overlap_of(text: str) -> Overlap:
    """Count what the permutes of a compiled program, given its `as_text()`, lie beside, whatever the chip."""
    program = Program.parse(text)
    permutes = _permutes(program)
    flights = {name: Flight(sum(x.bytes for x in item.arrays)) for name, (item, _) in permutes.items()}
    follow_all(program, flights)
    beside = collections.Counter(flight.beside for flight in flights.values())
    return Overlap(
        asynchronous=sum(flight.asynchronous for flight in flights.values()),
        hidden=beside[BESIDE_HOP],
        beside_other_work=beside[BESIDE_WORK],
        synchronous=sum(not flight.asynchronous for flight in flights.values()),
        exposed=beside[BESIDE_NOTHING],
        exposed_bytes=sum(flight.size for flight in flights.values() if flight.beside == BESIDE_NOTHING),
        bytes_in_flight=max((flight.in_flight for flight in flights.values()), default=0),
    )


def _permutes(program: Program) -> dict[str, tuple[Collective, Instruction]]:
    """Find the permutes that a program runs, by name."""
    run = {name: x for computation in program.scheduled for name, x in program.computations[computation].items()}
    return {x.name: (x, run[x.name]) for x in collectives_in(program) if x.kind == PERMUTE and x.name in run}


def warnings_of(text: str, share: Share) -> list[str]:
    """Find what should not be in a compiled training step, a line each: what, how large, and the remedy.

    - Synchronous permutes, which nothing hides.
    - Permutes of a mebibyte or more that start and end with nothing between, all in one line.
    - Activations that a collective gives a device for the whole sequence; see `findings.whole_sequences`.
    - Masks that are kept in memory outside of kernels; see `findings.kept_masks`.

    Args:
      text: the program's `as_text()`.
      share: a device's part of the step that it was compiled from.
    """
    program, lines = Program.parse(text), []
    found = transfers(text, share.topology.chip, share.slice_mesh)
    for x in found:
        if not x.asynchronous:
            runs = "an unknown number of times" if x.runs is None else f"{x.runs} times"
            lines.append(
                f"{x.name} ({x.phase}, {x.bytes / 2**20:.3g} MiB, {runs}) is synchronous, nothing hides it; give the "
                "compiler work between its start and its use that does not need it, or send it with another transfer"
            )
    alone = [x for x in found if x.asynchronous and x.beside == BESIDE_NOTHING and x.bytes >= _LARGE]
    if alone:
        waits = sum(x.exposed_seconds * (x.runs or 1) for x in alone)
        lines.append(
            f"{len(alone)} of {len(found)} transfers start and end with nothing of their size between them, the first "
            f"{alone[0].name} ({alone[0].phase}, {alone[0].bytes / 2**20:.3g} MiB): a step waits {waits:.3g} s for "
            "them; try another mesh, with fewer devices along tp or fsdp, and compare what the report says"
        )
    return lines + whole_sequences(program, share) + kept_masks(program, share)


def _phase(instruction: Instruction) -> str:
    name = instruction.attribute(r'op_name="([^"]*)"')
    if name is None:
        return "?"
    return "backward" if "transpose(jvp" in name else "forward"
