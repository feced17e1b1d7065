"""How long attention takes: the schedule that a strategy states, priced at a pod's rates.

Closed forms, so that a pod of a thousand devices is planned at once. `planning.simulator` runs the same schedules
device by device; the tests hold the two together.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from ring_attention.hardware.rates import Wires
from ring_attention.parallel.workload import Schedule, Step, Workload

MERGE_PASSES = 4
"""Passes over a result in float32 that adding it to what is there takes: hops of 8,192 and of 16,384 tokens on an H100
(docs/kernels.md) take 3.7 to 4.3, what cutting arrays costs among them.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast one device computes attention.

    Attributes:
      forward, backward: operations a second.
      memory: bytes a second of its HBM.
      tile: tokens of a tile, of which a ragged mask wastes half along its edge.
      call, call_backward: seconds of a kernel's call beside its pairs.
    """

    forward: float
    backward: float
    memory: float
    tile: int = 0
    call: float = 0.0
    call_backward: float = 0.0


class Seconds(NamedTuple):
    """Seconds of one step of a schedule: of computing, and of the transfers beside it. A device waits for both."""

    compute: float
    keys: float = 0.0
    gradients: float = 0.0

    @property
    def wire(self) -> float:
        """Seconds that the wire is busy."""
        return self.keys + self.gradients

    @property
    def total(self) -> float:
        """Seconds until both have ended."""
        return max(self.compute, self.wire)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one pass of an attention.

    Attributes:
      compute: while the device computes.
      wire: while its wires are busy.
      exposed: while it waits for them.
    """

    compute: float
    wire: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds from start to end."""
        return self.compute + self.exposed


def price_steps(schedule: Schedule, pace: Pace, wires: Wires) -> list[Seconds]:
    """The seconds of each step of a schedule, on the device that computes most."""
    work, last = schedule.work, max(step.hops.stop for step in schedule.steps) - 1
    local, hop = (_seconds(pairs, schedule, pace) for pairs in (_local_pairs(work), _hop_pairs(work, last)))
    priced = []
    for step in schedule.steps:
        own, places, wire = 0 in step.hops, len(step.hops), getattr(wires, step.way)
        compute = (local * own + hop * (places - own)) * step.part + call_seconds(step, schedule, pace)
        sent = (size / wire + wires.latency * (size > 0) for size in (step.keys, step.gradients))
        priced.append(Seconds(compute, *sent))
    return priced


def call_seconds(step: Step, schedule: Schedule, pace: Pace) -> float:
    """The seconds that a step's kernels take beside their pairs: their calls, and adding their results to earlier ones.

    Keys of many places are computed in a few calls, whose results are added up as those of hops are.
    """
    work, places = schedule.work, len(step.hops)
    result = work.bytes_of(work.shard, work.heads, 4)  # out, or dq
    gradients = work.bytes_of(work.shard, 2 * work.kv_heads, 4) * schedule.backward  # dk and dv of one place
    call = pace.call_backward if schedule.backward else pace.call
    merged = (result + gradients * places) * (step.merges or places > 1)
    return MERGE_PASSES * merged / pace.memory * step.part + call * bool(places)


def add_up(steps: Sequence[Seconds]) -> Times:
    """The times of a pass whose devices go from step to step together."""
    compute, wire = sum(step.compute for step in steps), sum(step.wire for step in steps)
    return Times(compute, wire, sum(step.total for step in steps) - compute)


def _seconds(pairs: float, schedule: Schedule, pace: Pace) -> float:
    """Seconds of so many pairs, for all heads and sequences of a device."""
    work = schedule.work
    if work.layout == "striped" and work.causal and work.devices > 1:
        pairs *= 1 + min(pace.tile / work.shard, 1.0)  # every hop has a diagonal, whose tiles are computed whole
    operations = 4 * work.batch * work.heads * work.head_dim * pairs
    return operations * 2.5 / pace.backward if schedule.backward else operations / pace.forward


def _local_pairs(work: Workload) -> float:
    """Pairs of a query and a key of the same shard."""
    tokens = work.shard
    if not work.causal:
        return float(tokens) ** 2
    window = min(work.window or tokens, tokens)
    return tokens * window - window * (window - 1) / 2


def _hop_pairs(work: Workload, hops: int) -> float:
    """Pairs of one of so many hops, on the device that has the most."""
    t = work.shard
    if hops == 0:
        return 0.0
    if work.window and work.window < work.seq_len:
        return max(t * min(work.window, work.seq_len) - _local_pairs(work), 0.0) / hops
    if not work.causal or work.layout == "contiguous":
        return float(t) ** 2
    return t * t / 2
