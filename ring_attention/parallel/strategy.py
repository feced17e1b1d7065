"""What every strategy is: facts about it, a check of what it can do, and an attention over shards of a sequence."""

import dataclasses
import math
from typing import ClassVar

import jax

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import Kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.workload import Schedule, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Where an attention runs, whatever its strategy.

    Attributes:
      axis_name: of the devices that hold the sequence.
      layout: in which they hold it.
      kernel, blocks: how tiles are computed.
    """

    axis_name: str
    layout: SequenceLayout
    kernel: Kernel
    blocks: BlockSizes

    @property
    def devices(self) -> int:
        """P, the number of devices that hold the sequence."""
        return self.layout.ring_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way to compute attention over a sequence that several devices hold. Its fields are its options.

    Attributes:
      name: by which it is chosen.
      source: who described it.
      exact: whether a query attends to every key that the mask shows.
      full: whether the mask may show every key: full attention.
      causal: whether it can hide later tokens.
      memory: of one device in the forward pass, beside its shards of q, k, v and out, in words: n tokens, P devices,
        W window, d and d_kv the heads and the key/value heads times head_dim.
      communication: what one device sends in the forward pass, in words.
      claim: (memory, communication) as the comparison in docs/problems.md has it, or None.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    exact: ClassVar[bool] = True
    full: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    memory: ClassVar[str]
    communication: ClassVar[str]
    claim: ClassVar[tuple[str, str] | None] = None

    def check(self, context: Context, q_shape: tuple[int, ...], kv_heads: int, mask: MaskSpec) -> None:
        """Raise ValueError for what it cannot do. q_shape is that of a shard, [B,t,H,D]."""

    def attend(self, context: Context, q, k, v, segments, mask: MaskSpec, sinks) -> jax.Array:
        """Out [B,H,t,D] in the dtype of q, of this device's slices q [B,H,t,D], k and v [B,K,t,D]."""
        raise NotImplementedError

    def memory_bytes(self, work: Workload) -> int:
        """Of the largest arrays that one device holds at once in the forward pass beside its shards of q, k, v, out."""
        raise NotImplementedError

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """Bytes that one device sends in the forward pass, or in the backward pass where nothing is computed again."""
        raise NotImplementedError

    def schedule(self, work: Workload, backward: bool = False) -> Schedule | None:
        """What each device computes and sends, step by step, in one pass; None if that is not known."""
        return None

    def variants(self, work: Workload, both_ways: bool) -> list["Strategy"]:
        """The strategy with each choice of options that may suit the work; `both_ways`: links carry both at once."""
        return [self]

    @property
    def family(self) -> str:
        """The name of the strategy that this one is a special case of, or its own."""
        return next(kind.name for kind in reversed(type(self).__mro__) if hasattr(kind, "name"))


def closest_divisor(number: int, wanted: float, multiple_of: int = 1) -> int | None:
    """The divisor of `number` nearest to `wanted` (in ratio) that is a multiple of `multiple_of`, or None."""
    if number < 1 or number % multiple_of:
        return None
    rest = number // multiple_of
    small = [n for n in range(1, math.isqrt(rest) + 1) if rest % n == 0]
    divisors = sorted({n * multiple_of for n in small} | {rest // n * multiple_of for n in small})
    return min(divisors, key=lambda n: abs(math.log(n / wanted)))
