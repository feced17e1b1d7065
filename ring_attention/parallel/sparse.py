"""Sparse attention: a token sees those just before it, and of the others every `stride`-th.

Child et al. 2019, "Generating Long Sequences with Sparse Transformers", the strided pattern, both parts in one head.
The near part is a window, and travels like one. In the far part a token sees only tokens of its own residue modulo the
stride: an all-to-all gives each device all tokens of some residues, where the far part is plain attention within each.
No tile that the pattern empties is computed, and no device ever holds the keys of all tokens.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.attention import online_softmax
from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Tokens
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.checks import require
from ring_attention.parallel.ring import Ring, check_pairs
from ring_attention.parallel.strategy import Context, ShardTokens, Strategy, closest_divisor
from ring_attention.parallel.workload import Workload

TOKENS = 2
"""Axis of tokens in arrays [B,H,t,D]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FarPart:
    """The part of sparse attention in which tokens see others of their own residue modulo `stride`."""

    context: Context
    stride: int

    @property
    def residues(self) -> int:
        """How many residues a device takes."""
        return self.stride // self.context.devices

    def to_residues(self, *arrays) -> list[Any]:
        """Arrays [B,H,t,...] or [B,t] as [B*r,H,n,...] or [B*r,n]: r residues of this device, the n tokens of each."""
        P, r = self.context.devices, self.residues

        def convert(x):
            axis = 1 if x.ndim == 2 else TOKENS
            B, before, after = x.shape[0], x.shape[1:axis], x.shape[axis + 1 :]
            x = x.reshape(B, *before, -1, P, r, *after)
            x = lax.all_to_all(x, self.context.axis_name, axis + 1, axis, tiled=True)  # residues for tokens
            x = jnp.moveaxis(x.reshape(B, *before, -1, r, *after), axis + 1, 1)
            return x.reshape(B * r, *before, -1, *after)

        return [convert(x) for x in arrays]

    def to_tokens(self, *arrays):
        """The way back, of arrays [B*r,H,n,...]."""
        r = self.residues

        def convert(x):
            heads, after = x.shape[1], x.shape[3:]
            x = jnp.moveaxis(x.reshape(-1, r, *x.shape[1:]), 1, 3)  # [B,H,n,r,...]
            x = x.reshape(*x.shape[:3], 1, r, *after)
            x = lax.all_to_all(x, self.context.axis_name, 2, 3, tiled=True)
            return x.reshape(x.shape[0], heads, -1, *after)

        return [convert(x) for x in arrays]

    def pair(self, me, tokens: ShardTokens, q) -> BlockPair:
        """All tokens of each residue among each other, without those that are near."""
        r, n = self.residues, q.shape[TOKENS]
        shard_len = n * self.stride // self.context.devices
        of_residue_0 = self.context.layout.all_positions(shard_len).reshape(-1, self.stride)[:, 0]
        residues = me * r + jnp.arange(r, dtype=jnp.int32)
        batch = q.shape[0] // r
        positions, mask = jnp.tile(residues[:, None] + of_residue_0[None], (batch, 1)), tokens.mask
        others = dataclasses.replace(tokens.queries, segments=None)  # which are those of the keys
        queries, keys = jax.tree.map(lambda x: self.to_residues(x)[0], (others, tokens.keys))
        queries = dataclasses.replace(queries, positions=positions, segments=keys.segments)
        keys = dataclasses.replace(keys, positions=positions)
        dropout = mask.dropout and dataclasses.replace(mask.dropout, batch=jnp.repeat(mask.dropout.batch, r))
        return BlockPair(queries, keys, dataclasses.replace(mask, min_distance=self.stride, dropout=dropout))


def near_window(window: int | None, stride: int) -> int:
    """The window of the near part."""
    return stride if window is None else min(window, stride)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Strategy):
    """The tokens just before, and every `stride`-th of the others.

    Attributes:
      stride: tokens less than this far away are seen, and those whose distance is a multiple of it; by default the
        power of two nearest to the root of the length, about where the pattern has the fewest pairs. It must be a
        multiple of the number of devices and divide the chunks of the layout.
    """

    name = "sparse"
    source = "Child et al. 2019"
    exact = False
    full = False
    memory = "n/P (d + 2 d_kv) by residues, and twice n/P d of statistics in float32"
    communication = "n/P (d + 2 d_kv, and d in float32) for the far part, 2 stride d_kv for the near part"
    claim = ("O(n)", "varies")

    stride: int | None = None

    def stride_of(self, seq_len: int) -> int:
        """The stride for so many tokens, whatever the devices and the layout, which must not change the pattern."""
        return 2 ** round(math.log2(seq_len) / 2) if self.stride is None else self.stride

    def check(self, context: Context, q_shape, kv_heads: int, mask: MaskSpec) -> None:
        """Residues must be shared out evenly."""
        layout, P, shard_len = context.layout, context.devices, q_shape[1]
        require(
            layout.kind not in ("striped", "given"),
            f'strategy="sparse" cuts shards into runs of consecutive tokens, but layout="{layout.kind}" has none; '
            'use "contiguous" or "zigzag"',
        )
        require(
            not (isinstance(mask.window, tuple) or mask.intervals),
            'strategy="sparse" takes no intervals, and only a window that is as wide before a token as after it; give '
            'window=W, or choose strategy="ring"',
        )
        chunk, chunks = shard_len // layout.chunks_per_shard, P * layout.chunks_per_shard
        stride = self.stride_of(mask.seq_len or P * shard_len)
        fitting = closest_divisor(chunk, max(stride, 1), multiple_of=P)
        unit = chunks * max(math.lcm(stride, P), 1)
        padded = (
            f"pad the sequence to {-(-P * shard_len // unit) * unit} tokens with stride={max(math.lcm(stride, P), P)}"
        )
        remedy = padded if fitting is None else f"give stride={fitting}, or {padded}"
        require(
            stride >= 1 and stride % P == 0 and chunk % stride == 0,
            f'strategy="sparse" got stride={stride}, need a multiple of the {P} devices that divides the {chunk} '
            f"consecutive tokens of a {layout.kind} shard; {remedy}",
        )
        check_pairs(context, dataclasses.replace(mask, window=near_window(mask.behind, stride)), shard_len)
        residues = Tokens(None)
        context.kernel.check_pair(BlockPair(residues, residues, dataclasses.replace(mask, min_distance=stride)))

    def forward(self, context: Context, me, q, k, v, tokens: ShardTokens) -> SoftmaxState:
        """The softmax state of this device's queries over all keys that they see, near ones first."""
        far = self._far_part(context, tokens.mask, q.shape[TOKENS])
        state = Ring().forward(context, me, q, k, v, self._near(far.stride, tokens))
        q, k, v = far.to_residues(q, k, v)
        empty = SoftmaxState.before(q, v)
        found = context.kernel.forward(q, k, v, far.pair(me, tokens, q), empty, context.blocks)
        return online_softmax.merge(state, *far.to_tokens(*online_softmax.finalize(found)))

    def backward(self, context: Context, me, q, k, v, tokens: ShardTokens, stats: GlobalStats):
        """Gradients of both parts, each with the statistics of all keys."""
        far = self._far_part(context, tokens.mask, q.shape[TOKENS])
        near = Ring().backward(context, me, q, k, v, self._near(far.stride, tokens), stats)
        q, k, v, dout, lse, delta = far.to_residues(q, k, v, stats.dout, stats.lse, stats.delta)
        nothing = vary_over(jnp.zeros(q.shape, jnp.float32), axes_of(q))
        pair, stats = far.pair(me, tokens, q), GlobalStats(None, lse, dout, delta)
        found = context.kernel.backward(q, k, v, stats, pair, nothing, context.blocks)
        return tuple(x + y for x, y in zip(near, far.to_tokens(*found), strict=True))

    def _far_part(self, context: Context, mask: MaskSpec, shard_len: int) -> FarPart:
        return FarPart(context=context, stride=self.stride_of(mask.seq_len or context.devices * shard_len))

    def _near(self, stride: int, tokens: ShardTokens) -> ShardTokens:
        """The tokens with the mask of what is seen because it is near."""
        mask = dataclasses.replace(tokens.mask, window=near_window(tokens.mask.behind, stride))
        return dataclasses.replace(tokens, mask=mask)

    def memory_bytes(self, work: Workload) -> int:
        """q, k and v by residues, and the statistics of both parts in float32."""
        swapped = work.bytes_of(work.shard, work.heads) + 2 * work.bytes_of(work.shard, work.kv_heads)
        return swapped + 2 * work.bytes_of(work.shard, work.heads, 4)

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """The near part as a ring with a window; of the far part all but one in P of what changes places."""
        P, t, H, K = work.devices, work.shard, work.heads, work.kv_heads
        near = dataclasses.replace(work, window=near_window(work.window, self.stride_of(work.seq_len)))
        statistics = 4 * work.batch * t * H  # one number for each query and head
        far = work.bytes_of(t, H) + 2 * work.bytes_of(t, K) + work.segment_bytes(t)
        if backward:
            far += work.bytes_of(t, H) + 2 * statistics + work.bytes_of(t, H, 4) + 2 * work.bytes_of(t, K, 4)
        else:
            far += work.bytes_of(t, H, 4) + statistics
        return Ring().sent_bytes(near, backward) + far * (P - 1) // P
