"""One attention in numbers: its sizes, and the schedule by which a strategy computes it.

A strategy states its own schedule (`Strategy.schedule`). The planner prices it, the simulator runs it device by device.
"""

import dataclasses
from typing import NamedTuple

HOP, BACK, BOTH_WAYS, GATHER, SWAP = "hop", "hop_back", "hop_both", "gather", "swap"
"""Ways to send: to the next place of a ring, or to the one before; half of it each way round; from all to all; heads
for tokens.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes and the mask of one attention, for working out what it costs a device.

    Attributes:
      batch: B, sequences of one device.
      seq_len: T, tokens of the whole sequence.
      heads: H.
      kv_heads: K.
      head_dim: D.
      devices: P, that hold the sequence.
      itemsize: bytes of an element of q, k and v.
      layout: of the sequence.
      causal, window: the mask.
      segments: whether there are segment ids, of 4 bytes each.
      count_hops: whether a ring counts its hops where there are segment ids.
      hops: how many hops forth and back keys take, where packed documents decide it; None where the mask does.
    """

    seq_len: int
    devices: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    batch: int = 1
    itemsize: int = 2
    layout: str = "contiguous"
    causal: bool = True
    window: int | None = None
    segments: bool = False
    count_hops: bool = True
    hops: tuple[int, int] | None = None

    @property
    def shard(self) -> int:
        """t, tokens of a device."""
        return self.seq_len // self.devices

    def bytes_of(self, tokens: int, heads: int, itemsize: int | None = None) -> int:
        """Bytes of an array of so many tokens and heads."""
        return self.batch * tokens * heads * self.head_dim * (self.itemsize if itemsize is None else itemsize)

    def segment_bytes(self, tokens: int) -> int:
        """Bytes of the segment ids of so many tokens."""
        return 4 * self.batch * tokens * self.segments


class Step(NamedTuple):
    """What a device does from one wait to the next: it computes while transfers run, and then waits for both.

    Attributes:
      hops: how many places before this device the keys come from that it computes with. range(1) is its own shard, an
        empty range computes nothing.
      part: share of the pairs of those block pairs that this step computes.
      keys: bytes that leave a device for the next step to compute with: K and V, or all that a swap moves.
      gradients: bytes of dK and dV that leave a device.
      way: how they travel, one of the ways above.
    """

    hops: range = range(0)
    part: float = 1.0
    keys: float = 0
    gradients: float = 0
    way: str = HOP

    @property
    def merges(self) -> bool:
        """Whether the result is added to that of earlier steps."""
        return self.hops.start > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """One pass of an attention.

    Attributes:
      work: the attention among the places of the ring, with the heads of one device.
      steps: what each device does, one after the other.
      backward: whether it is the backward pass.
      width: how many consecutive devices share a place, each with heads of its own.
    """

    work: Workload
    steps: tuple[Step, ...]
    backward: bool
    width: int = 1

    @property
    def ways(self) -> set[str]:
        """How this pass sends."""
        return {step.way for step in self.steps if step.keys or step.gradients}


def later_part(work: Workload) -> float:
    """The part of a shard's own pairs whose keys stand in the second half of the shard."""
    tokens, half = work.shard, work.shard - work.shard // 2
    return half * (half + 1) / (tokens * (tokens + 1)) if work.causal else 0.5
