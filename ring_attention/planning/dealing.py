"""What dealing packed documents by their work gains: rows drawn like a corpus, each way to lay them out simulated."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ring_attention.checks import ConfigError
from ring_attention.parallel.dealing import deal_documents
from ring_attention.parallel.dealt_rows import DealtRows, default_chunks
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import DATA, FSDP
from ring_attention.parallel.strategy import Strategy
from ring_attention.parallel.workload import BOTH_WAYS, Schedule, Workload
from ring_attention.planning.attention_times import Times, call_seconds
from ring_attention.planning.balance import balance_of, hops_needed, tiles_by_hop
from ring_attention.planning.documents import DocumentLengths
from ring_attention.planning.plan import Plan
from ring_attention.planning.shares import LayerGroup, Share
from ring_attention.planning.simulator import Machine, simulate
from ring_attention.planning.step_times import (
    KindTime,
    StepTime,
    attention_bytes,
    kind_time,
    pace_of,
    ring_wires,
    schedule_of,
    step_time,
)

LEAST_ROWS = 8
"""Rows that are drawn at least, whatever the batch."""

LEAST_TILE = 16
"""Tokens of a side of the smallest tile that is worth counting."""


class Way(NamedTuple):
    """A way to lay packed rows out, and to bring queries and keys together.

    Attributes:
      name: in words.
      strategy: that brings them together.
      dealt: whether rows are dealt by their documents; zigzag otherwise.
      counts: whether keys go only as far as the documents ask for.
    """

    name: str
    strategy: Strategy
    dealt: bool = False
    counts: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laid:
    """What one way to lay packed rows out is predicted to take, the mean of the steps that were drawn.

    Attributes:
      name: of the way.
      balance: tiles of the device that computes most over the mean.
      hops: steps of the ring, forth and back; None where no keys hop.
      sent: bytes of keys, values and their gradients that a device sends in a training step.
      forward, backward: useful operations a second of a device, of visible pairs alone.
      time: of the training step.
    """

    name: str
    balance: float
    hops: float | None
    sent: float
    forward: float
    backward: float
    time: StepTime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dealing:
    """The ways compared.

    Attributes:
      lengths: of the documents.
      rows: how many rows were drawn.
      visible: share of a causal row's pairs that is visible, the mean of the rows.
      tile: tokens of a side of the tiles that are counted.
      ways: the first is the config's own strategy in zigzag, with which the others are compared.
    """

    lengths: DocumentLengths
    rows: int
    visible: float
    tile: int
    ways: tuple[Laid, ...]

    def speedup(self, way: Laid) -> float:
        """How many times as fast as the first way a training step gets."""
        return self.ways[0].time.total / way.time.total

    def attention_speedup(self, way: Laid) -> float:
        """How many times as fast as the first way its attention gets."""
        return attention_seconds(self.ways[0]) / attention_seconds(way)


def attention_seconds(way: Laid) -> float:
    """Seconds of attention in a step, with what devices wait for each other and for transfers."""
    return way.time.attention + way.time.attention_waits


def ways_of(plan: Plan) -> list[Way]:
    """List the ways to lay documents out: each strategy in zigzag, those that count their hops dealt as well.

    The config's own strategy comes first; of others only the fastest variant.
    """
    variants = [plan.own.strategy, *(one.strategy for one in plan.candidates)]
    variants = [one for one in variants if not {BOTH_WAYS} & schedule_of(plan.share, one).ways]
    by_name = {strategy.name: strategy for strategy in reversed(variants)}
    ordered = sorted(by_name.values(), key=lambda one: one.name != plan.own.strategy.name)
    ways = [Way(f"{one.name}, zigzag", one) for one in ordered]
    ways += [Way(f"{one.name}, zigzag, hops counted", one, counts=True) for one in ordered if one.counts_hops]
    merging = {one for one in ordered if schedule_of(plan.share, one).width > 1}  # whose places hold several shards
    ways += [
        Way(f"{one.name}, dealt", one, dealt=True, counts=one.counts_hops) for one in ordered if one not in merging
    ]
    return ways


def compare_layouts(plan: Plan, lengths: DocumentLengths, *, seed: int = 0) -> Dealing:
    """Predict a step of packed rows, drawn from documents of these lengths, by each of `ways_of`.

    Taken for granted: documents in random order; every tile that holds a visible pair computed whole, at the rate that
    the kernel reaches on one long document; transfers beside the computation; groups of devices with rows of their own
    wait for the slowest. Layers with a window or chunk keep what is planned for them, and so does all beside attention.

    Raises:
      ConfigError: for one device, for no layer that sees whole documents, or rows that are too short to be dealt.
    """
    share = plan.share
    groups = [group for group in share.groups if group.kind.reach is None]
    if share.ring == 1 or not groups:
        lack = "the mesh has sp=1" if share.ring == 1 else "every layer has a window or a chunk"
        raise ConfigError(f"--documents: {lack}, so that no documents are dealt; leave --documents out, or use sp > 1")
    chunks, tile = _chunks_and_tile(share, groups[0])
    config = share.config
    steps = -(-LEAST_ROWS // config.batch_size)
    stream = lengths.rows(config.seq_len, seed=seed)
    drawn = [list(itertools.islice(stream, share.batch)) for _ in range(steps * config.batch_size // share.batch)]
    even = [SequenceLayout("zigzag", share.ring)] * len(drawn)
    dealt = [DealtRows(np.stack([deal_documents(row, share.ring, chunks) for row in rows])) for rows in drawn]
    laid = tuple(
        _Simulated(share, groups, way, drawn, dealt if way.dealt else even, tile).laid() for way in ways_of(plan)
    )
    visible = np.mean([_pairs(row) for rows in drawn for row in rows]) / _pairs(np.array([config.seq_len]))
    return Dealing(lengths=lengths, rows=steps * config.batch_size, visible=float(visible), tile=tile, ways=laid)


def _chunks_and_tile(share: Share, group: LayerGroup) -> tuple[int, int]:
    """Choose the chunks of a shard, and the largest tile, no larger than the kernel's, of which runs are multiples."""
    chunks = default_chunks(share.tokens)
    tile = math.gcd(pace_of(share, group.kind).tile, share.tokens // chunks, share.tokens // 2)
    if tile < LEAST_TILE:
        raise ConfigError(
            f"--documents: {share.tokens} tokens of a device fall into {chunks} chunks and tiles of {tile}, need tiles "
            f"of {LEAST_TILE} at least; choose seq_len as a multiple of {share.ring * chunks * LEAST_TILE}"
        )
    return chunks, tile


def _pairs(lengths: np.ndarray) -> float:
    """Count the pairs of a query and a key that see each other in a row of documents of these lengths."""
    return float((lengths * (lengths + 1.0)).sum() / 2)


@dataclasses.dataclass(frozen=True)
class _Simulated:
    """One way to lay out the rows that were drawn: `drawn` are those that a group of devices has at once."""

    share: Share
    groups: list[LayerGroup]
    way: Way
    drawn: list[list[np.ndarray]]
    layouts: Sequence[SequenceLayout | DealtRows]
    tile: int

    def laid(self) -> Laid:
        """Simulate all of it, and put its mean into the step."""
        share, strategy = self.share, self.way.strategy
        width = strategy.schedule(share.work()).width
        tiles, works = [], []
        for rows, layout in zip(self.drawn, self.layouts, strict=True):
            tiles.append(tiles_by_hop(layout.merged(width) if width > 1 else layout, rows, self.tile))
            works.append(
                share.work(layout="zigzag", window=None, hops=hops_needed(tiles[-1]) if self.way.counts else None)
            )
        kinds = tuple(self._kind_time(group, strategy, tiles, works) for group in self.groups)
        operations = 4 * share.heads * share.head_width * np.mean([sum(map(_pairs, rows)) for rows in self.drawn])
        useful = float(operations / share.ring)
        return Laid(
            name=self.way.name,
            balance=float(np.mean([balance_of(work).total for work in tiles])),
            hops=float(np.mean([sum(work.hops or (share.ring - 1, 0)) for work in works]))
            if strategy.counts_hops
            else None,
            sent=sum(kind.sent for kind in kinds),
            forward=useful / kinds[0].forward.total,
            backward=2.5 * useful / kinds[0].backward.total,
            time=step_time(share, share.strategy, kinds),
        )

    def _kind_time(
        self, group: LayerGroup, strategy: Strategy, tiles: list[np.ndarray], works: list[Workload]
    ) -> KindTime:
        """Simulate the layers of one kind; groups of devices with rows of their own wait for the slowest of them."""
        share, pairs = self.share, [work * float(self.tile) ** 2 for work in tiles]
        abreast = share.mesh[DATA] * share.mesh[FSDP]
        passes = []
        for backward in (False, True):
            timelines = []
            for one, work in zip(pairs, works, strict=True):
                machine = _machine(share, group, strategy.schedule(work, backward))
                layout = SequenceLayout("zigzag", share.ring)
                timelines.append(simulate(strategy, layout, work, machine, pairs=one, backward=backward))
            total = np.reshape([timeline.seconds for timeline in timelines], (-1, abreast)).max(1).mean()
            compute, wire = (
                float(np.mean([timeline.busy(kind).mean() for timeline in timelines])) for kind in ("device", "link")
            )
            passes.append(Times(compute, wire, float(total) - compute))
        sent = round(np.mean([attention_bytes(share, group, strategy, work) for work in works]))
        return kind_time(share, group, strategy, *passes, sent)


def _machine(share: Share, group: LayerGroup, schedule: Schedule) -> Machine:
    """Describe the devices of the pod, and the wires that a schedule uses, to the simulator."""
    pace, wires = pace_of(share, group.kind), ring_wires(share, schedule.width)
    rate = pace.backward if schedule.backward else pace.forward
    calls = [call_seconds(step, schedule, pace) for step in schedule.steps if step.hops]
    return Machine(
        seconds_per_pair=(4 * share.head_width / rate,) * share.ring,
        hop_seconds=float(np.mean(calls)),
        bandwidth=min((getattr(wires, way) for way in schedule.ways), default=math.inf),
        latency=wires.latency,
    )
