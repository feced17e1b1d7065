"""Softmax over keys that arrive a block at a time (Milakov & Gimelshein 2018; Rabe & Staats 2021).

Two forms of the same statistics, both float32 whatever the input dtype. Inside a kernel: `Running`, the unnormalised
sum and the maximum so far, in base 2 because exp2 is cheaper than exp. Between kernels: `(out, lse)`, the normalised
output and the natural logarithm of the sum of exponentials, -inf where a query has seen no key (its output is then 0).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOG2_E = 1.4426950408889634


class Running(NamedTuple):
    """Statistics of the scores seen so far.

    Attributes:
      weighted: float32 [..., r, D], sum over keys of 2**(score - top) * value.
      top: float32 [..., r], the largest score so far in base 2, -inf before the first.
      total: float32 [..., r], sum over keys of 2**(score - top).
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


def update(running: Running, s_rk: jax.Array, v_kD: jax.Array) -> Running:
    """Take in the scores (base 2, -inf where hidden) of some more keys and their values."""
    top = jnp.maximum(running.top, s_rk.max(-1))
    p_rk = jnp.exp2(s_rk - finite(top)[:, None])
    fade = jnp.exp2(running.top - finite(top))
    seen = jnp.dot(p_rk.astype(v_kD.dtype), v_kD, preferred_element_type=jnp.float32)
    return Running(running.weighted * fade[:, None] + seen, top, running.total * fade + p_rk.sum(-1))


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
    """Normalise: out float32 [..., r, D] and lse float32 [..., r]."""
    empty = running.total == 0
    out = running.weighted / jnp.where(empty, 1.0, running.total)[..., None]
    lse = running.top / LOG2_E + jnp.log(jnp.where(empty, 1.0, running.total))
    return out, lse


def merge(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Join (out, lse) over two disjoint sets of keys; either or both may be empty for a row."""
    (out_a, lse_a), (out_b, lse_b) = first, second
    top = finite(jnp.maximum(lse_a, lse_b))
    a, b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = a + b
    share = 1.0 / jnp.where(total == 0, 1.0, total)
    out = out_a * (a * share)[..., None] + out_b * (b * share)[..., None]
    return out, top + jnp.log(total)
