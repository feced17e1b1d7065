"""Ring self-attention: keys go around once for whole rows of scores, then values go around to be weighed by them.

Li et al. 2021, "Sequence Parallelism: Long Sequence Training from System Perspective". Each device keeps its rows of
scores over the whole sequence, so memory grows with n^2/P, and the gradients of keys and values are summed by an
all-reduce of which a device needs one part in P. The published method shows every key to every query; here the rows
take any mask, because each device knows where the keys stand.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from ring_attention.attention.online_softmax import finite
from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.attention.weights import BlockScores
from ring_attention.parallel.strategy import Context, ShardTokens, Strategy
from ring_attention.parallel.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Circle:
    """P devices around which one array travels."""

    axis_name: str
    devices: int

    def around(self, visit, carry, block):
        """`visit(carry, block, source) -> carry` for every device's block, P-1 transfers."""
        P, me = self.devices, lax.axis_index(self.axis_name)
        pairs = [(i, (i + 1) % P) for i in range(P)]

        def step(carry_and_block, number):
            carry, block = carry_and_block
            following = lax.ppermute(block, self.axis_name, pairs)
            return (visit(carry, block, lax.rem(me - number + P, np.int32(P))), following), None

        (carry, block), _ = lax.scan(step, (carry, block), jnp.arange(P - 1, dtype=jnp.int32))
        return visit(carry, block, lax.rem(me + 1, np.int32(P)))

    def sum_of_own(self, x_BKTD, shard_len: int):
        """The tokens of this device in the sum over devices."""
        start = lax.axis_index(self.axis_name) * shard_len
        return lax.dynamic_slice_in_dim(lax.psum(x_BKTD, self.axis_name), start, shard_len, axis=2)


def _dot(pattern: str, x, y):
    return jnp.einsum(pattern, x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_qk(circle: _Circle, q_BKGtD, k_BKsD):
    """float32 products of this device's queries and all keys, [B,K,G,t,T], keys in the order of the devices."""
    return _products(circle, q_BKGtD, k_BKsD)


def _products(circle: _Circle, q_BKGtD, k_BKsD):
    # Undecorated, as `_sums` below: what a forward rule computes must let tangents through, for Hessians.
    *rows, t, _ = q_BKGtD.shape
    s = k_BKsD.shape[2]

    def visit(products, k, source):
        return lax.dynamic_update_slice_in_dim(products, _dot("bkgtd,bksd->bkgts", q_BKGtD, k), source * s, axis=-1)

    empty = vary_over(jnp.zeros((*rows, t, circle.devices * s), jnp.float32), axes_of((q_BKGtD, k_BKsD)))
    return circle.around(visit, empty, k_BKsD)


def _ring_qk_forward(circle, q, k):
    return _products(circle, q, k), (q, k)


def _ring_qk_backward(circle, residuals, dproducts):
    q, k = residuals
    s, dproducts = k.shape[2], dproducts.astype(q.dtype)

    def visit(dq, k, source):
        columns = lax.dynamic_slice_in_dim(dproducts, source * s, s, axis=-1)
        return dq + _dot("bkgts,bksd->bkgtd", columns, k)

    dq = circle.around(visit, vary_over(jnp.zeros(q.shape, jnp.float32), axes_of((q, k))), k)
    dk = circle.sum_of_own(_dot("bkgts,bkgtd->bksd", dproducts, q), s)
    return dq.astype(q.dtype), vary_over(dk, axes_of(k)).astype(k.dtype)


ring_qk.defvjp(_ring_qk_forward, _ring_qk_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_av(circle: _Circle, weights_BKGtT, v_BKsD):
    """float32 sums of all values, [B,K,G,t,D], by the weights of this device's queries."""
    return _sums(circle, weights_BKGtT, v_BKsD)


def _sums(circle: _Circle, weights_BKGtT, v_BKsD):
    s = v_BKsD.shape[2]

    def visit(out, v, source):
        columns = lax.dynamic_slice_in_dim(weights_BKGtT, source * s, s, axis=-1)
        return out + _dot("bkgts,bksd->bkgtd", columns, v)

    shape = (*weights_BKGtT.shape[:-1], v_BKsD.shape[-1])
    return circle.around(visit, vary_over(jnp.zeros(shape, jnp.float32), axes_of((weights_BKGtT, v_BKsD))), v_BKsD)


def _ring_av_forward(circle, weights, v):
    return _sums(circle, weights, v), (weights, v)


def _ring_av_backward(circle, residuals, dout):
    weights, v = residuals
    s, dout = v.shape[2], dout.astype(v.dtype)

    def visit(dweights, v, source):
        return lax.dynamic_update_slice_in_dim(
            dweights, _dot("bkgtd,bksd->bkgts", dout, v).astype(weights.dtype), source * s, axis=-1
        )

    dweights = circle.around(visit, vary_over(jnp.zeros_like(weights), axes_of((weights, v))), v)
    dv = circle.sum_of_own(_dot("bkgts,bkgtd->bksd", weights, dout), s)
    return dweights, vary_over(dv, axes_of(v)).astype(v.dtype)


ring_av.defvjp(_ring_av_forward, _ring_av_backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingSelfAttention(Strategy):
    """Whole rows of scores; keys circulate, then values.

    The rows are plain products over all keys of a device at once, so a kernel and its tiles have nothing to choose.
    """

    name = "ring_self_attention"
    source = "Li et al. 2021 (sequence parallelism v1)"
    memory = "n^2/P numbers for each head: whole rows of scores"
    communication = "2 n d_kv (P-1)/P; backward an all-reduce of all dK and dV besides"
    claim = ("O(n/P) claimed", "O(n P)")

    def attend(self, context: Context, q, k, v, tokens: ShardTokens, sinks):
        """Out [B,H,t,D_v] in the dtype of q and float32 lse [B,H,t], from whole rows of scores."""
        circle = _Circle(axis_name=context.axis_name, devices=context.devices)
        t, K = q.shape[2], k.shape[1]
        q_BKGtD = rearrange(q, "B (K G) t D -> B K G t D", K=K)
        block = _scores(context, tokens, t, K)
        scores, _ = block.scores(ring_qk(circle, q_BKGtD, k))
        sinks_1KG11 = jnp.float32(-jnp.inf) if sinks is None else sinks.reshape(1, K, -1, 1, 1)
        top = lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks_1KG11))
        p = jnp.exp(scores - finite(top))
        total = p.sum(-1, keepdims=True) + jnp.exp(sinks_1KG11 - finite(top))
        total = jnp.where(total == 0, 1.0, total)
        weights, factor = p / total, block.dropout_factor()
        weights = weights if factor is None else weights * factor
        out: Any = ring_av(circle, weights.astype(v.dtype), v)
        lse = rearrange(top + jnp.log(total), "B K G t 1 -> B (K G) t")
        return rearrange(out, "B K G t D -> B (K G) t D").astype(q.dtype), lse

    def memory_bytes(self, work: Workload) -> int:
        """The rows of scores in float32."""
        return 4 * work.batch * work.heads * work.shard * work.seq_len

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """K and V go around; backward once more, and a ring's all-reduce of dK and dV sends them in float32 twice."""
        others = (work.devices - 1) * work.shard
        sent = 2 * work.bytes_of(others, work.kv_heads)
        if backward:
            return sent + 4 * work.bytes_of(others, work.kv_heads, 4)
        return sent + work.segment_bytes(others)


def _scores(context: Context, tokens: ShardTokens, shard_len: int, kv_heads: int) -> BlockScores:
    """The scores of this device's queries and all keys, for arrays [B,K,G,t,T]."""
    me = lax.axis_index(context.axis_name)
    queries, mask = context.placed(tokens.queries, me, shard_len), tokens.mask
    keys = jax.tree.map(lambda x: lax.all_gather(x, context.axis_name, axis=1, tiled=True), tokens.keys)
    if keys.positions is None:
        keys = dataclasses.replace(keys, positions=context.layout.all_positions(shard_len).reshape(1, -1))
    drop = mask.dropout

    def of_heads(x_H):
        return None if x_H is None else x_H.reshape(1, kv_heads, -1, 1, 1)

    return BlockScores(
        mask,
        jax.tree.map(lambda x: x[:, None, None, :, None], queries),
        jax.tree.map(lambda x: x[:, None, None, None, :], keys),
        of_heads(mask.slopes),
        None if drop is None else drop.batch[:, None, None, None, None],
        of_heads(None if drop is None else drop.heads),
        masked=True,
    )
