"""How long an attention takes on devices that are not alike: computation, links, double buffering and waiting.

A device runs its computations in the order of the program, a link its transfers one after the other; each begins when
what it needs has ended. That is all a strategy is here: which computation waits for which transfer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ring_attention.checks import require, require_choice
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.ulysses import kv_copies
from ring_attention.parallel.workload import Workload
from ring_attention.planning.balance import work_by_hop

SIMULATED = ("ring", "all_gather", "ulysses", "usp")
"""Strategies that can be simulated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What the devices and links do.

    Attributes:
      seconds_per_pair: of each device, for one head: a forward pass over one pair of a query and a key.
      backward_ratio: of a backward pass to a forward pass.
      hop_seconds: what every hop costs beside its pairs.
      bandwidth: bytes a second, of the link from each device to the next.
      latency: seconds of each transfer.
      blocking: a device that has begun a transfer computes nothing until it has ended, as on the CPU. Otherwise
        transfers run beside the computation, as on TPU and GPU.
      jitter: standard deviation of the logarithm of each computation's time, whose mean stays as it is.
    """

    seconds_per_pair: tuple[float, ...]
    backward_ratio: float = 2.5
    hop_seconds: float = 0.0
    bandwidth: float = float("inf")
    latency: float = 0.0
    blocking: bool = False
    jitter: float = 0.0

    @staticmethod
    def of_speeds(speeds: Sequence[float], **others) -> "Machine":
        """Devices that do so many pairs a second."""
        return Machine(seconds_per_pair=tuple(1 / speed for speed in speeds), **others)


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that a device or a link did, from `start` to `end`, in seconds."""

    resource: str
    name: str
    start: float
    end: float


class Timeline:
    """What happened, in the order in which it was begun."""

    def __init__(self, machine: Machine, seed: int = 0):
        self.machine, self.spans = machine, []
        self._free, self._random = {}, np.random.default_rng(seed)

    @property
    def seconds(self) -> float:
        """When everything has ended."""
        return max((span.end for span in self.spans), default=0.0)

    def compute(self, device: int, name: str, pairs: float, after: Sequence[Span | None] = ()) -> Span:
        """A device works on so many pairs."""
        machine = self.machine
        jitter = np.exp(machine.jitter * self._random.standard_normal() - machine.jitter**2 / 2)
        seconds = (machine.hop_seconds + pairs * machine.seconds_per_pair[device]) * jitter
        return self._add(f"device {device}", name, seconds, after)

    def transfer(self, device: int, name: str, size: float, after: Sequence[Span | None] = ()) -> Span:
        """So many bytes leave a device."""
        return self._add(f"link {device}", name, self.machine.latency + size / self.machine.bandwidth, after)

    def _add(self, resource: str, name: str, seconds: float, after: Sequence[Span | None]) -> Span:
        start = max([self._free.get(resource, 0.0), *(span.end for span in after if span)])
        span = Span(resource, name, start, start + seconds)
        self._free[resource] = span.end
        self.spans.append(span)
        return span


def simulate(
    strategy: str,
    layout: SequenceLayout,
    work: Workload,
    machine: Machine,
    *,
    backward: bool = False,
    ulysses_size: int = 1,
    seed: int = 0,
) -> Timeline:
    """One attention, its forward pass or its backward pass.

    Args:
      strategy: one of `SIMULATED`.
      layout: of the sequence over `work.devices` devices.
      work: sizes of a full attention, causal or not; its layout is the one given here.
      machine: the devices, as many as `work.devices`.
      backward: the backward pass rather than the forward pass.
      ulysses_size: of "usp".
      seed: of the jitter.

    Raises:
      ValueError: for a strategy or a mask that is not simulated, another number of devices, or heads that the strategy
        cannot share out.
    """
    require_choice("strategy", strategy, SIMULATED)
    require(
        work.window is None and not work.segments,
        f"window={work.window}, segments={work.segments}: only full attention is simulated; leave them out",
    )
    P = work.devices
    require(
        len(machine.seconds_per_pair) == layout.ring_size == P,
        f"got {len(machine.seconds_per_pair)} speeds and a layout for {layout.ring_size} devices, need {P} of both",
    )
    timeline = Timeline(machine, seed)
    size = {"usp": ulysses_size, "ulysses": P}.get(strategy, 1)
    fits = size >= 1 and P % size == 0 and work.heads % size == 0
    require(fits, f"{size} devices cannot share {work.heads} heads of {P} devices; choose a divisor of both")
    if strategy == "all_gather":
        _all_gather(timeline, _pairs(layout, work, backward, machine).sum(1), work, backward)
    else:
        _usp(timeline, layout, work, backward, size)
    return timeline


def seconds_of_both_passes(
    strategy: str, layout: SequenceLayout, work: Workload, machine: Machine, *, ulysses_size: int = 1, seed: int = 0
) -> float:
    """Forward pass and then the backward pass; arguments as of `simulate`."""
    passes = (
        simulate(strategy, layout, work, machine, backward=backward, ulysses_size=ulysses_size, seed=seed)
        for backward in (False, True)
    )
    return sum(timeline.seconds for timeline in passes)


def _pairs(layout: SequenceLayout, work: Workload, backward: bool, machine: Machine) -> np.ndarray:
    """[P, hops] of all heads and sequences, in units of a forward pass."""
    pairs = work_by_hop(layout, work.seq_len, causal=work.causal, window=work.window)
    return pairs * work.heads * work.batch * (machine.backward_ratio if backward else 1.0)


def _usp(timeline: Timeline, layout: SequenceLayout, work: Workload, backward: bool, size: int) -> None:
    """Swap heads for tokens among `size` neighbours, go around rings across them, swap back."""
    P = work.devices
    places, kv_heads = P // size, work.kv_heads * kv_copies(work.kv_heads, size)
    pairs = _pairs(layout.merged(size), work, backward, timeline.machine) / size
    before = _swap(timeline, work, size, "swap", [None] * P)
    ended = [None] * P
    for member in range(size):
        devices = [place * size + member for place in range(places)]
        block, gradients = (2 * work.bytes_of(work.shard, kv_heads, itemsize) for itemsize in (None, 4))
        later = _later_half(work.seq_len // places) if work.causal else 0.5
        ring = _Ring(timeline, devices, pairs, block, later, [before[device] for device in devices])
        for device, span in zip(devices, ring.backward(gradients) if backward else ring.forward(), strict=True):
            ended[device] = span
    _swap(timeline, work, size, "swap back", ended)


def _swap(timeline: Timeline, work: Workload, size: int, name: str, after: list[Span | None]) -> list[Span | None]:
    """Half of Ulysses' all-to-alls, among `size` neighbours at a time; everyone waits for everyone."""
    if size == 1:
        return after
    kv_heads = work.kv_heads * kv_copies(work.kv_heads, size)
    sent = (work.bytes_of(work.shard, work.heads) + work.bytes_of(work.shard, kv_heads)) * (size - 1) / size
    spans = []
    for first in range(0, work.devices, size):
        group = range(first, first + size)
        arrived = [after[device] for device in group]
        spans += [timeline.transfer(device, name, sent, arrived) for device in group]
        last = max(spans[-size:], key=lambda span: span.end)
        spans[-size:] = [last] * size
    return spans


def _all_gather(timeline: Timeline, pairs: np.ndarray, work: Workload, backward: bool) -> None:
    """A key/value head at a time: the next one's keys arrive, and gradients leave, while this one is computed."""
    P, groups = work.devices, work.kv_heads
    keys = 2 * (P - 1) * work.bytes_of(work.shard, 1)
    gradients = 2 * (P - 1) * work.bytes_of(work.shard, 1, 4)

    def together(name: str, size: float, after: list[Span | None]) -> Span:
        spans = [timeline.transfer(device, name, size, after) for device in range(P)]
        return max(spans, key=lambda span: span.end)

    ready, done = together("gather 0", keys, []), [[None] * P]
    for group in range(groups):
        before = done[-1]
        ahead = together(f"gather {group + 1}", keys, before) if group + 1 < groups else None
        if backward and group:
            leaving = together(f"scatter {group - 1}", gradients, before)
        else:
            leaving = None
        after = [ready, *([ahead, leaving] if timeline.machine.blocking else [])]
        done.append([timeline.compute(i, f"head {group}", pairs[i] / groups, after) for i in range(P)])
        ready = ahead
    if backward:
        together(f"scatter {groups - 1}", gradients, done[-1])


def _later_half(tokens: int) -> float:
    """The part of a shard's own causal pairs whose keys are in its second half."""
    half = tokens - tokens // 2
    return half * (half + 1) / (tokens * (tokens + 1))


class _Ring:
    """The steps of `parallel.ring_pass.RingPass`, whose whole shards go all the way around."""

    def __init__(
        self, timeline: Timeline, devices: list[int], pairs: np.ndarray, block: float, later: float, after: list
    ):
        self.timeline, self.devices, self.pairs, self.block, self.later = timeline, devices, pairs, block, later
        self.number = len(devices)
        self.reached = list(after)  # what each device's program waited for last

    def forward(self) -> list[Span]:
        """Home first; each block is sent on before it is computed."""
        arriving = self._send("keys 1", self.block, self._both_reached()) if self.number > 1 else None
        self._compute(0, arriving, None)
        for step in range(1, self.number):
            arrived = arriving
            arriving = None
            if step + 1 < self.number:
                arriving = self._send(f"keys {step + 1}", self.block, self._both_reached(arrived))
            self._compute(step, arriving, arrived)
        return self.reached

    def backward(self, gradients: float) -> list[Span]:
        """Half of home first and half last; gradients follow their keys a hop behind, and return from the last one."""
        if self.number == 1:
            return self._compute(0, None, None)
        arriving, gathered = self._send("keys 1", self.block, self._both_reached()), None
        self._compute(0, arriving, None, share=self.later)
        for step in range(1, self.number):
            arrived, arriving = arriving, None
            if step + 1 < self.number:
                arriving = self._send(f"keys {step + 1}", self.block, self._both_reached(arrived))
            if step > 1:
                gathered = self._send(f"gradients {step - 1}", gradients, self._both_reached())
            self._compute(step, arriving, arrived, gathered)
            if gathered and not self.timeline.machine.blocking:  # they are added to what was computed
                self.reached = [self._latest(*pair) for pair in zip(self.reached, gathered, strict=True)]
        home = self._send("gradients home", gradients, self._both_reached())
        self._compute(0, home, None, share=1 - self.later)
        return [self._latest(*pair) for pair in zip(self.reached, home, strict=True)]

    def _both_reached(self, arrived: list[Span] | None = None) -> list[list]:
        """What the transfer from place i to the next waits for: both programs have come so far, the block is there."""
        following = self.reached[1:] + self.reached[:1]
        blocks = arrived or [None] * self.number
        return [list(spans) for spans in zip(self.reached, following, blocks, strict=True)]

    def _send(self, name: str, size: float, after: list[list]) -> list[Span]:
        """Each place's block to the next; returns what arrives at each."""
        spans = [self.timeline.transfer(self.devices[i], name, size, after[i]) for i in range(self.number)]
        return spans[-1:] + spans[:-1]

    def _compute(self, step: int, arriving, arrived, gathered=None, share: float = 1.0) -> list[Span]:
        """All places compute a share of a hop; where transfers block, they first await those that have begun."""
        spans = []
        for i, device in enumerate(self.devices):
            after = [self.reached[i], arrived[i] if arrived else None]
            if self.timeline.machine.blocking:
                for begun in (arriving, gathered):
                    if begun:
                        after += [begun[i], begun[(i + 1) % self.number]]
            spans.append(self.timeline.compute(device, f"hop {step}", share * self.pairs[i, step], after))
        self.reached = spans
        return spans

    @staticmethod
    def _latest(x: Span, y: Span) -> Span:
        return x if x.end >= y.end else y
