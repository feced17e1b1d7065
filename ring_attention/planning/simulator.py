"""How long an attention takes on devices that are not alike: computation, links, double buffering and waiting.

The schedule that a strategy states is run device by device. A device computes one thing after the other, a link carries
one thing after the other, and each begins when what it needs has ended.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ring_attention.checks import require, require_choice, require_shape
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.strategies import find_strategy, scheduled
from ring_attention.parallel.strategy import Strategy
from ring_attention.parallel.workload import BACK, GATHER, HOP, SWAP, Schedule, Workload
from ring_attention.planning.balance import work_by_hop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """How fast devices and links are.

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
        """A machine whose devices compute so many pairs a second."""
        return Machine(seconds_per_pair=tuple(1 / speed for speed in speeds), **others)


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that a device or a link did, from `start` to `end`, in seconds."""

    resource: str
    name: str
    start: float
    end: float


class Timeline:
    """What the devices and links of a machine did, in the order in which it was begun.

    Attributes:
      reached: seconds [P] at which each device's program has come as far as it has, what it waited for included.
    """

    def __init__(self, machine: Machine, schedule: Schedule, seed: int = 0):
        self.machine, self.width = machine, schedule.width
        self._begun: list[tuple[str, str, np.ndarray, np.ndarray]] = []
        places, devices = schedule.work.devices, schedule.work.devices * schedule.width
        self.reached, self._device_free, self._link_free = np.zeros((3, devices))
        computing = sum(bool(step.hops) for step in schedule.steps)
        noise = np.random.default_rng(seed).standard_normal((self.width, computing, places))
        self._jitter = iter(
            np.exp(machine.jitter * noise - machine.jitter**2 / 2).transpose(1, 2, 0).reshape(-1, devices)
        )

    @property
    def spans(self) -> list[Span]:
        """All of it, device by device for each thing that was begun."""
        return [
            Span(f"{kind} {i}", name, *span)
            for kind, name, start, end in self._begun
            for i, span in enumerate(zip(start.tolist(), end.tolist(), strict=True))
        ]

    @property
    def seconds(self) -> float:
        """Seconds at which everything has ended."""
        return max((float(end.max()) for *_, end in self._begun), default=0.0)

    def busy(self, kind: str = "device") -> np.ndarray:
        """Seconds [P] for which each device computed, or each "link" carried something."""
        return sum((end - start for of, _, start, end in self._begun if of == kind), np.zeros(len(self.reached)))

    def compute(self, name: str, pairs: np.ndarray, after: np.ndarray) -> None:
        """Let every device work on so many pairs [P], not before `after` [P]."""
        seconds = (self.machine.hop_seconds + pairs * np.array(self.machine.seconds_per_pair)) * next(self._jitter)
        start = np.maximum(np.maximum(self._device_free, self.reached), after)
        self._device_free = self.reached = self._add("device", name, start, seconds)

    def send(self, name: str, size: float, way: str, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Let so many bytes leave every device when sender and receiver have come so far, and not before `after` [P].

        Returns:
          Seconds [P] at which what a device receives is there, and at which what it sends has left.
        """
        places = {HOP: self.width, BACK: -self.width}.get(way, 0)
        receivers = np.roll(self.reached, -places) if places else 0.0
        ready = np.maximum(np.maximum(self.reached, receivers), after)
        if not places:
            ready = self._last_of_group(ready, way)
        seconds = np.full(len(ready), self.machine.latency + size / self.machine.bandwidth)
        left = self._link_free = self._add("link", name, np.maximum(self._link_free, ready), seconds)
        return np.roll(left, places) if places else self._last_of_group(left, way), left

    def _last_of_group(self, times: np.ndarray, way: str) -> np.ndarray:
        """Find for each device the latest time of those that take part in the same collective."""
        groups = times.reshape(-1, self.width if way == SWAP else len(times))
        return np.broadcast_to(groups.max(1, keepdims=True), groups.shape).reshape(-1)

    def _add(self, kind: str, name: str, start: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        self._begun.append((kind, name, start, start + seconds))
        return start + seconds


def simulate(
    strategy: str | Strategy,
    layout: SequenceLayout | DealtRows,
    work: Workload,
    machine: Machine,
    *,
    pairs: np.ndarray | None = None,
    backward: bool = False,
    seed: int = 0,
) -> Timeline:
    """Run one attention, its forward pass or its backward pass.

    Args:
      strategy: by name, or with options; one whose schedule is known.
      layout: of the sequence over `work.devices` devices.
      work: sizes of the attention, which is full where nobody counts its pairs; its layout is the one given here.
      machine: the devices, as many as `work.devices`.
      pairs: [places, places], of a query and a key, of one head and all sequences, that each place of the ring computes
        at each hop, as `work_by_hop` counts them for packed documents; None for those of full attention. `work.hops`
        says how far keys then go.
      backward: the backward pass rather than the forward pass.
      seed: of the jitter.

    Raises:
      ValueError: for a strategy or a mask that is not simulated, another number of devices, or heads that the strategy
        cannot share out.
    """
    strategy = find_strategy(strategy)
    require_choice("strategy", strategy.name, scheduled(work))
    require(
        work.window is None and (pairs is not None or not work.segments),
        f"window={work.window}, segments={work.segments}: only full attention is simulated; leave them out, or "
        "give the pairs of packed documents",
    )
    P = work.devices
    require(
        len(machine.seconds_per_pair) == layout.ring_size == P,
        f"got {len(machine.seconds_per_pair)} speeds and a layout for {layout.ring_size} devices, need {P} of both",
    )
    schedule = strategy.schedule(work, backward)
    U, ways = schedule.width, schedule.ways
    fits = P % U == 0 and work.heads % U == 0
    require(fits, f"{U} devices cannot share {work.heads} heads of {P} devices; choose a divisor of both")
    require(ways <= {HOP, BACK, GATHER, SWAP}, f"{strategy}: transfers both ways are not simulated; leave duplex out")
    ratio = machine.backward_ratio if backward else 1.0  # pairs are those of a forward pass, of all heads and sequences
    if pairs is None:
        require(isinstance(layout, SequenceLayout), "rows dealt by tables need their pairs; count them by work_by_hop")
        pairs = work_by_hop(layout.merged(U), work.seq_len, causal=work.causal) * work.batch
    require_shape("pairs", pairs.shape, (P // U, P // U), "PP")
    timeline = Timeline(machine, schedule, seed)
    _run(timeline, schedule, np.repeat(pairs * (work.heads * ratio / U), U, axis=0))
    return timeline


def _run(timeline: Timeline, schedule: Schedule, pairs: np.ndarray) -> None:
    """Take every step of a schedule; pairs [P, hops] are those of each device."""
    blocking, arrived = timeline.machine.blocking, np.zeros(len(pairs))
    for number, step in enumerate(schedule.steps):
        begun, arriving, returned = [], np.zeros(len(pairs)), np.zeros(len(pairs))
        if step.keys:
            arriving, left = timeline.send(f"keys {number + 1}", step.keys, step.way, after=arrived)
            begun += [arriving, left]
        if step.gradients:
            returned, left = timeline.send(f"gradients {number}", step.gradients, step.way, after=np.zeros(len(pairs)))
            begun += [returned, left]
        if step.hops:
            name = f"hop {step.hops.start}" if len(step.hops) == 1 else "all hops"
            after = np.maximum.reduce([arrived, *(begun if blocking else [])])
            timeline.compute(name, step.part * pairs[:, list(step.hops)].sum(1), after)
        else:  # nothing but waiting
            timeline.reached = np.maximum(timeline.reached, arriving)
        timeline.reached = np.maximum(timeline.reached, returned)
        arrived = arriving


def seconds_of_both_passes(
    strategy: str | Strategy, layout: SequenceLayout | DealtRows, work: Workload, machine: Machine, **others
) -> float:
    """Add up the seconds of the forward and the backward pass; arguments as of `simulate`."""
    passes = (simulate(strategy, layout, work, machine, backward=back, **others) for back in (False, True))
    return sum(timeline.seconds for timeline in passes)
