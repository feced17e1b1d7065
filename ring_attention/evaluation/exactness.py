"""How exact is exact? Errors against a float64 oracle, beside those of a dense implementation in the same dtype.

The bound is a factor of two over the dense implementation: a constant would be either too loose for float32 or too
tight for bfloat16, and would say nothing about what sharding the sequence costs.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.reference import reference_attention, reference_gradients

NAMES = ("out", "dq", "dk", "dv")
"""What is compared, in the order in which every function here gives it."""


def random_qkv(
    seed: int, B: int, T: int, H: int, K: int, D: int, dtype: str = "float32", S: int | None = None
) -> list[jax.Array]:
    """Normally distributed q [B,T,H,D], k and v [B,S,K,D] (S is T by default) and a cotangent [B,T,H,D] of out."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, D), (B, S or T, K, D), (B, S or T, K, D), (B, T, H, D)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def random_segments(seed: int, B: int, T: int, count: int = 4) -> np.ndarray:
    """Segment ids, int32 [B,T], of `count` packed documents of random length, other lengths in each row."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.integers(1, count + 1, (B, T)), axis=1).astype(np.int32)


def relative_error(got, want) -> float:
    """Error of `got` in the Euclidean norm over that of `want`, computed in float64."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def out_and_gradients(fn, q, k, v, dout) -> tuple[jax.Array, ...]:
    """(out, dq, dk, dv) of fn(q, k, v) for the cotangent `dout`, compiled as one program."""

    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(fn, q, k, v)
        return out, *vjp(dout)

    return run(q, k, v, dout)


def oracle(q, k, v, dout, **mask) -> tuple[np.ndarray, ...]:
    """(out, dq, dk, dv) in float64; `mask` as in `reference_attention`."""
    return reference_attention(q, k, v, **mask), *reference_gradients(q, k, v, dout, **mask)


def dense_attention(q, k, v, *, causal: bool = True, segment_ids=None) -> jax.Array:
    """The whole matrix of scores at once, as most people write it: products in the dtype of q, softmax in float32."""
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    mask = jnp.tril(jnp.ones((T, S), bool)) if causal else jnp.ones((T, S), bool)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def errors(got, want) -> list[float]:
    """Relative errors of (out, dq, dk, dv), one by one."""
    return [relative_error(g, w) for g, w in zip(got, want, strict=True)]
