"""Softmax over keys that arrive a block at a time (Milakov & Gimelshein 2018; Rabe & Staats 2021).

Two forms of the same statistics, both float32 whatever the input dtype. While keys arrive: `SoftmaxState`, the
unnormalised sum and the maximum so far. In the end: `(out, lse)`, the normalised output and the natural logarithm of
the sum of exponentials, -inf where a query has seen no key (its output is then 0).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_attention.attention.varying import axes_of, vary_over


class SoftmaxState(NamedTuple):
    """Statistics of the scores seen so far.

    Attributes:
      acc: float32 [..., r, D_v], sum over keys of exp(score - max) * value.
      max: float32 [..., r], the largest score so far, -inf before the first.
      sum: float32 [..., r], sum over keys of exp(score - max).
    """

    acc: jax.Array
    max: jax.Array
    sum: jax.Array

    @staticmethod
    def empty(shape: tuple[int, ...]) -> "SoftmaxState":
        """No key seen; `shape` is that of the output, [..., r, D_v]."""
        rows = shape[:-1]
        return SoftmaxState(
            jnp.zeros(shape, jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32)
        )

    @staticmethod
    def before(q: jax.Array, v: jax.Array) -> "SoftmaxState":
        """No key seen by queries q [..., r, D] of values v [..., D_v]; inside a shard_map it varies as q does."""
        return vary_over(SoftmaxState.empty((*q.shape[:-1], v.shape[-1])), axes_of(q))


def finite(max_r: jax.Array) -> jax.Array:
    """Replace -inf by 0 in `max_r`: -inf less the result is then -inf rather than NaN."""
    return jnp.where(max_r == -jnp.inf, 0.0, max_r)


def update(state: SoftmaxState, s_rk: jax.Array, v_kD: jax.Array, factor_rk: jax.Array | None = None) -> SoftmaxState:
    """Take in the scores (-inf where hidden) of some more keys and their values.

    `factor_rk` multiplies what each value counts, but not the sum that normalises (dropout). `r` may be several axes.
    """
    max_r = jnp.maximum(state.max, s_rk.max(-1))
    p_rk = jnp.exp(s_rk - finite(max_r)[..., None])
    fade = jnp.exp(state.max - finite(max_r))
    counted = (p_rk if factor_rk is None else p_rk * factor_rk).astype(v_kD.dtype)
    seen = jnp.dot(counted.reshape(-1, counted.shape[-1]), v_kD, preferred_element_type=jnp.float32)
    acc = state.acc * fade[..., None] + seen.reshape(state.acc.shape)
    return SoftmaxState(acc, max_r, state.sum * fade + p_rk.sum(-1))


def merge(state: SoftmaxState, out: jax.Array, lse: jax.Array) -> SoftmaxState:
    """Take in what `finalize` made of some more keys, [..., r, D] and [..., r]; either side may be empty for a row.

    A chain of hops keeps `max` and `sum` apart until its end: a float32 lse that was rounded at every hop would lose
    a bit more at each, and the error would grow with the length of the ring.
    """
    max_r = jnp.maximum(state.max, lse)
    fade, weight = jnp.exp(state.max - finite(max_r)), jnp.exp(lse - finite(max_r))
    acc = state.acc * fade[..., None] + out * weight[..., None]
    return SoftmaxState(acc, max_r, state.sum * fade + weight)


def finalize(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """Normalise: out float32 [..., r, D] and lse float32 [..., r]."""
    sum_r = jnp.where(state.sum == 0, 1.0, state.sum)
    return state.acc / sum_r[..., None], state.max + jnp.log(sum_r)
