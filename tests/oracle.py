"""What the numerics tests share: random inputs, the float64 oracle's errors, and the bound on them."""

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.reference import reference_attention, reference_gradients

NAMES = ("out", "dq", "dk", "dv")


def random_qkv(seed, B, T, H, K, D, dtype="float32", S=None):
    """q, k, v and a cotangent of out, in natural order."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, D), (B, S or T, K, D), (B, S or T, K, D), (B, T, H, D)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def random_segments(seed, B, T, count=4):
    """Segment ids [B,T] of `count` documents of random length, other lengths in each row."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.integers(1, count + 1, (B, T)), axis=1).astype(np.int32)


def relative_error(got, want):
    """Relative error in the Euclidean norm."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def out_and_gradients(fn, q, k, v, dout):
    """(out, dq, dk, dv) of fn(q, k, v) for the cotangent dout."""

    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(fn, q, k, v)
        return out, *vjp(dout)

    return run(q, k, v, dout)


def oracle(q, k, v, dout, **mask):
    """(out, dq, dk, dv) in float64."""
    return reference_attention(q, k, v, **mask), *reference_gradients(q, k, v, dout, **mask)


def dense_attention(q, k, v, *, causal=True, segment_ids=None):
    """The whole matrix of scores at once, as most people write it: products in the dtype of q, softmax in float32."""
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    mask = jnp.tril(jnp.ones((T, S), bool)) if causal else jnp.ones((T, S), bool)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def dense_errors(q, k, v, dout, **mask):
    """Relative errors of (out, dq, dk, dv) of `dense_attention` against the oracle."""
    got = out_and_gradients(lambda q, k, v: dense_attention(q, k, v, **mask), q, k, v, dout)
    return [relative_error(g, w) for g, w in zip(got, oracle(q, k, v, dout, **mask), strict=True)]


def assert_as_exact_as_dense(got, q, k, v, dout, **mask):
    """Each of (out, dq, dk, dv) is at most twice as far from the oracle as a dense implementation in the same dtype."""
    bounds = dense_errors(q, k, v, dout, **mask)
    for name, g, w, bound in zip(NAMES, got, oracle(q, k, v, dout, **mask), bounds, strict=True):
        error = relative_error(g, w)
        assert error <= 2 * bound, f"{name}: relative error {error:.2e}, dense has {bound:.2e}"
