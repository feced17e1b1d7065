"""How long attention takes by each strategy, in closed form, so that a pod of a thousand devices is planned at once.

`planning.simulator` steps through the same schedules device by device; the tests hold the two together.
"""

import dataclasses
from typing import NamedTuple

from ring_attention.hardware.rates import Wires
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.routes import plan_routes, token_hops
from ring_attention.parallel.ulysses import kv_copies
from ring_attention.parallel.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast one device computes attention.

    Attributes:
      forward, backward: operations a second.
      memory: bytes a second of its HBM.
      tile: tokens of a tile, of which a ragged mask wastes half along its edge.
    """

    forward: float
    backward: float
    memory: float
    tile: int = 0


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one pass, in seconds.

    Attributes:
      compute: that the device computes.
      wire: that its wires are busy.
      exposed: that it waits for them.
    """

    compute: float
    wire: float
    exposed: float

    @property
    def total(self) -> float:
        """From start to end."""
        return self.compute + self.exposed

    def __add__(self, other: "Times") -> "Times":
        """One after the other."""
        return Times(self.compute + other.compute, self.wire + other.wire, self.exposed + other.exposed)


def single_times(work: Workload, pace: Pace, backward: bool) -> Times:
    """One device that has the whole sequence of its heads."""
    return Times(_seconds(_home_pairs(work, work.seq_len), work, pace, backward), 0.0, 0.0)


class Step(NamedTuple):
    """What a device does at once, and waits for both: seconds of computing, and of its wire."""

    compute: float
    keys: float = 0.0
    gradients: float = 0.0

    @property
    def wire(self) -> float:
        """Seconds that the wire is busy."""
        return self.keys + self.gradients

    @property
    def seconds(self) -> float:
        """Until both have ended."""
        return max(self.compute, self.wire)


def ring_steps(work: Workload, pace: Pace, wires: Wires, backward: bool, duplex: bool = False) -> list[Step]:
    """The steps of `parallel.ring_pass.RingPass` on the device that computes most."""
    P, t = work.devices, work.shard
    routes = plan_routes(SequenceLayout(work.layout, P), t, causal=work.causal, window=work.window, duplex=duplex)
    hops, token_hops_of_all = max((route.hops for route in routes), default=0), token_hops(routes)
    home = _seconds(_home_pairs(work, t), work, pace, backward)
    if hops == 0:
        return [Step(home)]
    hop = _seconds(_hop_pairs(work, hops), work, pace, backward) + _merge_seconds(work, pace, backward)
    bandwidth = hops * (wires.hop_both if duplex else wires.hop)
    keys = 2 * work.bytes_of(token_hops_of_all, work.kv_heads) / bandwidth
    if not backward:
        return [Step(home, keys), *[Step(hop, keys)] * (hops - 1), Step(hop)]
    gradients = 2 * work.bytes_of(token_hops_of_all, work.kv_heads, 4) / bandwidth
    later = 0.25 if work.causal else 0.5  # of the home block, which is computed in two halves
    first, last = Step(home * later, keys), Step(home * (1 - later), 0.0, gradients)
    if hops == 1:
        return [first, Step(hop), last]
    return [first, Step(hop, keys), *[Step(hop, keys, gradients)] * (hops - 2), Step(hop, 0.0, gradients), last]


def ring_times(work: Workload, pace: Pace, wires: Wires, backward: bool, duplex: bool = False) -> Times:
    """A ring, in lock step."""
    return _in_lock_step(ring_steps(work, pace, wires, backward, duplex))


def all_gather_times(work: Workload, pace: Pace, wires: Wires, backward: bool, groups: int | None = None) -> Times:
    """All keys, a part of the heads at a time; the next part arrives while this one is computed."""
    groups = groups or work.kv_heads
    worst = _home_pairs(work, work.shard) + _hop_pairs(work, work.devices - 1) * (work.devices - 1)
    compute = _seconds(worst, work, pace, backward) / groups
    others = (work.devices - 1) * work.shard
    keys = 2 * work.bytes_of(others, work.kv_heads) / groups / wires.gather
    gradients = 2 * work.bytes_of(others, work.kv_heads, 4) / groups / wires.gather * backward
    middle = [Step(compute, keys, gradients)] * (groups - 1)
    return _in_lock_step([Step(0.0, keys), *middle, Step(compute), Step(0.0, 0.0, gradients)])


def usp_times(work: Workload, pace: Pace, inner: Wires, outer: Wires, backward: bool, size: int) -> Times:
    """Heads for tokens among `size` neighbours, a ring across; with size = P it is Ulysses. Nothing hides a swap."""
    kv_heads = work.kv_heads * kv_copies(work.kv_heads, size)
    swapped = 2 * (work.bytes_of(work.shard, work.heads) + work.bytes_of(work.shard, kv_heads)) * (size - 1) / size
    swap = swapped / inner.swap
    # Pairs of the places' ring, for the heads that one device keeps; fractions of heads are those of repeated ones.
    places = work.devices // size
    part = dataclasses.replace(work, devices=places, heads=work.heads // size, kv_heads=kv_heads // size)
    attention = ring_times(part, pace, outer, backward) if places > 1 else single_times(part, pace, backward)
    return Times(0.0, swap, swap) + attention


def _in_lock_step(steps: list[Step]) -> Times:
    """One after the other."""
    compute, wire = sum(step.compute for step in steps), sum(step.wire for step in steps)
    return Times(compute, wire, sum(step.seconds for step in steps) - compute)


def _home_pairs(work: Workload, tokens: int) -> float:
    """Pairs of a query and a key of the same shard, or sequence, of so many tokens."""
    if not work.causal:
        return float(tokens) ** 2
    reach = min(work.window or tokens, tokens)
    return tokens * reach - reach * (reach - 1) / 2


def _hop_pairs(work: Workload, hops: int) -> float:
    """Pairs of one of so many hops, on the device that has the most."""
    t = work.shard
    if hops == 0:
        return 0.0
    if work.window and work.window < work.seq_len:
        return max(t * min(work.window, work.seq_len) - _home_pairs(work, t), 0.0) / hops
    if not work.causal or work.layout == "contiguous":
        return float(t) ** 2
    return t * t / 2


def _seconds(pairs: float, work: Workload, pace: Pace, backward: bool) -> float:
    """Of so many pairs, for all of a device's heads and sequences."""
    if work.layout == "striped" and work.causal and work.devices > 1:
        pairs *= 1 + min(pace.tile / work.shard, 1.0)  # every hop has a diagonal, whose tiles are computed whole
    operations = 4 * work.batch * work.heads * work.head_dim * pairs
    return operations * 2.5 / pace.backward if backward else operations / pace.forward


def _merge_seconds(work: Workload, pace: Pace, backward: bool) -> float:
    """Of adding a hop's result in float32 to what is there: two arrays read, one written. Backward dq, dk and dv."""
    arrays = work.bytes_of(work.shard, work.heads + 2 * work.kv_heads * backward, 4)
    return 3 * arrays / pace.memory


def usp_sizes(work: Workload) -> list[int]:
    """How many neighbours may swap heads for tokens: proper divisors of the devices that divide the query heads."""
    return [size for size in range(2, work.devices) if work.devices % size == work.heads % size == 0]
