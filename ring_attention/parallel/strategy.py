"""What every strategy is: two passes over the shards of a sequence, a check of what it can do, and facts about it.

How the keys of one device get to the queries of another is the strategy's business. The softmax over all of them, the
residuals and the gradients of sinks are the same whichever it is: `attention_over_shards`.
"""

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ring_attention.attention import sinks as attention_sinks
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.derivatives import differentiated_once
from ring_attention.attention.kernels.contract import GlobalStats, Kernel
from ring_attention.attention.mask_spec import MaskSpec, scale_gradient
from ring_attention.attention.masks import Tokens
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.rounding import rounded
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.workload import Schedule, Workload

SAVED_NAMES = ("ring_attention_out", "ring_attention_lse", "ring_attention_rounding")
"""`checkpoint_name`s of what a remat policy must keep so that no strategy's forward pass runs twice.

The last is what rounding took from the first: of 16-bit arrays half a byte of each number (`rounding`).
Ulysses' swaps stand around its ring and are done again; ring self-attention saves neither, and is computed again.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The devices, layout and kernel of an attention, whatever its strategy.

    Attributes:
      axis_name: the axis of the devices that hold the sequence.
      layout: the layout of the sequence over the places of the ring.
      kernel, blocks: how tiles are computed.
      count_hops: whether a ring may count its hops as it runs, where arrays tell how far keys must go.
      width: how many consecutive devices share a place, each with heads of its own.
    """

    axis_name: str
    layout: SequenceLayout
    kernel: Kernel
    blocks: BlockSizes
    count_hops: bool = True
    width: int = 1

    @property
    def devices(self) -> int:
        """P, the number of devices that hold the sequence."""
        return self.layout.ring_size * self.width

    def placed(self, tokens: Tokens, place, shard_len: int, start: int = 0, stop: int | None = None) -> Tokens:
        """The `tokens` that stand from `start` to `stop` in the shard of a place, with positions by the layout.

        Those that have positions keep them: these travelled with them.
        """
        if tokens.positions is not None:
            return dataclasses.replace(tokens, runs=self.layout.runs(shard_len, start, stop))
        positions = self.layout.shard_positions(place, shard_len)[None, start:stop]
        return dataclasses.replace(tokens, positions=positions, runs=self.layout.runs(shard_len, start, stop))


class Hops(NamedTuple):
    """How often a ring passes keys on, to the next place and to the one before: int32, the same on all devices."""

    forth: jax.Array
    back: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTokens:
    """What is said of a device's own tokens, and how its queries see the keys of all devices.

    Attributes:
      queries, keys: arrays [B,t] of this device's tokens, of which those of keys travel with them. Positions are None
        where the layout and the device's number tell them.
      mask: how a query and a key make a weight.
      hops: of a ring, where the arrays tell them; None for as many as the layout and the mask need.
    """

    queries: Tokens
    keys: Tokens
    mask: MaskSpec
    hops: Hops | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention_over_shards(
    strategy: "Strategy", context: Context, q, k, v, tokens: ShardTokens, sinks
) -> tuple[jax.Array, jax.Array]:
    """Attention of this device's queries to all keys that they see, by the two passes of a strategy.

    Args:
      strategy: brings queries and keys together.
      context: where it runs.
      q: [B,H,t,D].
      k: [B,K,s,D].
      v: [B,K,s,D_v].
      tokens: where queries and keys stand, and the mask.
      sinks: float32 [H] or None.

    Returns:
      Out [B,H,t,D_v] in the dtype of q, and lse float32 [B,H,t], that of all keys and of the sink.
    """
    state = strategy.forward(context, *_bound(context, q, k, v, tokens))
    out, lse = attention_sinks.finalize(state, sinks)
    return out.astype(q.dtype), lse


def _bound(context: Context, q, k, v, tokens: ShardTokens) -> tuple:
    """(me, q, k, v, tokens), where this device's number and tokens seem to depend on k.

    They are the same in every layer. Where layers are a loop, JAX lifts what follows from such values alone out of it
    and keeps it: where the tokens of each hop stand, which of its tiles are computed, an array for every hop of the
    ring.
    """
    me, k, tokens = lax.optimization_barrier((lax.axis_index(context.axis_name), k, tokens))
    return me, q, k, v, tokens


def _forward(strategy: "Strategy", context: Context, q, k, v, tokens: ShardTokens, sinks):
    # Not by the decorated function: what a forward rule computes must let tangents through, for Hessians.
    state = strategy.forward(context, *_bound(context, q, k, v, tokens))
    out, lse = attention_sinks.finalize(state, sinks)
    out, rounding = rounded(out, q.dtype, keep=context.kernel.float32_out)
    out, lse, rounding = map(checkpoint_name, (out, lse, rounding), SAVED_NAMES)
    return (out, lse), (q, k, v, tokens, sinks, out, lse, rounding)


def _backward(strategy: "Strategy", context: Context, residuals, cotangents):
    q, k, v, tokens, sinks, out, lse, rounding = residuals
    stats = GlobalStats.of(out, lse, *cotangents, rounding=rounding)
    grads = strategy.backward(context, *_bound(context, q, k, v, tokens), stats=stats)
    of_scale = scale_gradient(tokens.mask, q, grads[0])
    of_tokens = None
    if of_scale is not None:
        of_tokens = dataclasses.replace(tokens, queries=None, keys=None, hops=None, mask=of_scale)
    grads = (differentiated_once(grad.astype(x.dtype)) for grad, x in zip(grads, (q, k, v), strict=True))
    return *grads, of_tokens, attention_sinks.gradient(sinks, stats)


attention_over_shards.defvjp(_forward, _backward)


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
    counts_hops: ClassVar[bool] = False
    memory: ClassVar[str]
    communication: ClassVar[str]
    claim: ClassVar[tuple[str, str] | None] = None

    def check(self, context: Context, q_shape: tuple[int, ...], kv_heads: int, mask: MaskSpec) -> None:
        """Raise ValueError for what it cannot do. q_shape is that of a shard, [B,t,H,D]."""

    def prepared(self, context: Context, tokens: ShardTokens, shard_len: int) -> ShardTokens:
        """The tokens of this device, which has `shard_len` keys, with what the strategy finds out of them, once."""
        return tokens

    attend = functools.partialmethod(attention_over_shards)
    """attend(context, q, k, v, tokens, sinks) -> (out, lse); by `attention_over_shards`, or in a way of its own."""

    def forward(self, context: Context, me, q, k, v, tokens: ShardTokens) -> SoftmaxState:
        """The softmax state of this device's queries over all keys that they see.

        Args:
          context: where it runs.
          me: int32, this device's number along the axis.
          q: [B,H,t,D].
          k: [B,K,s,D].
          v: [B,K,s,D_v].
          tokens: where queries and keys stand, and the mask.
        """
        raise NotImplementedError

    def backward(
        self, context: Context, me, q, k, v, tokens: ShardTokens, stats: GlobalStats
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float32 gradients of this device's q, k and v, given the statistics of its queries over all keys."""
        raise NotImplementedError

    def memory_bytes(self, work: Workload) -> int:
        """Bytes of the largest arrays of a device in the forward pass, beside its shards of q, k, v and out."""
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
