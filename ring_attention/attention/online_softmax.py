"""Softmax over keys that arrive a block at a time (Milakov & Gimelshein 2018; Rabe & Staats 2021).

Two forms of the same statistics, both float32 whatever the input dtype. While keys arrive: `Running`, the unnormalised
sum and the maximum so far. In the end: `(out, lse)`, the normalised output and the natural logarithm of the sum of
exponentials, -inf where a query has seen no key (its output is then 0).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Running(NamedTuple):
    """Statistics of the scores seen so far.

    Attributes:
      weighted: float32 [..., r, D], sum over keys of exp(score - top) * value.
      top: float32 [..., r], the largest score so far, -inf before the first.
      total: float32 [..., r], sum over keys of exp(score - top).
    """

    weighted: jax.Array
    top: jax.Array
    total: jax.Array

    @staticmethod
    def empty(shape: tuple[int, ...]) -> "Running":
        """No key seen; `shape` is that of the output, [..., r, D]."""
        rows = shape[:-1]
        return Running(
            jnp.zeros(shape, jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32)
        )


def finite(top: jax.Array) -> jax.Array:
    """Replace -inf by 0 in `top`: -inf less the result is then -inf rather than NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def update(running: Running, s_rk: jax.Array, v_kD: jax.Array, factor_rk: jax.Array | None = None) -> Running:
    """Take in the scores (-inf where hidden) of some more keys and their values.

    `factor_rk` multiplies what each value counts, but not the sum that normalises (dropout). `r` may be several axes.
    """
    top = jnp.maximum(running.top, s_rk.max(-1))
    p_rk = jnp.exp(s_rk - finite(top)[..., None])
    fade = jnp.exp(running.top - finite(top))
    counted = (p_rk if factor_rk is None else p_rk * factor_rk).astype(v_kD.dtype)
    seen = jnp.dot(counted.reshape(-1, counted.shape[-1]), v_kD, preferred_element_type=jnp.float32)
    weighted = running.weighted * fade[..., None] + seen.reshape(running.weighted.shape)
    return Running(weighted, top, running.total * fade + p_rk.sum(-1))


def absorb(running: Running, out: jax.Array, lse: jax.Array) -> Running:
    """Take in what `finish` made of some more keys, [..., r, D] and [..., r]; either side may be empty for a row.

    A chain of hops keeps `top` and `total` apart until its end: a float32 lse that was rounded at every hop would lose
    a bit more at each, and the error would grow with the length of the ring.
    """
    top = jnp.maximum(running.top, lse)
    fade, weight = jnp.exp(running.top - finite(top)), jnp.exp(lse - finite(top))
    weighted = running.weighted * fade[..., None] + out * weight[..., None]
    return Running(weighted, top, running.total * fade + weight)


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
    """Normalise: out float32 [..., r, D] and lse float32 [..., r]."""
    total = jnp.where(running.total == 0, 1.0, running.total)
    return running.weighted / total[..., None], running.top + jnp.log(total)
