"""How exact is exact? Errors against a float64 oracle, beside those of a dense implementation in the same dtype.

The bound is a factor of two over the dense implementation: a constant would be either too loose for float32 or too
tight for bfloat16, and would say nothing about what sharding the sequence costs.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.dropout import kept, seeds_of
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
    return reference_attention(q, k, v, **mask), *reference_gradients(q, k, v, dout, **mask)[:3]


def dense_attention(
    q,
    k,
    v,
    *,
    causal: bool = True,
    window: int | None = None,
    stride: int | None = None,
    segment_ids=None,
    kv_segment_ids=None,
    q_positions=None,
    kv_positions=None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks=None,
    alibi_slopes=None,
    dropout_rate: float = 0.0,
    dropout_key=None,
) -> jax.Array:
    """The whole matrix of scores at once, as most people write it: products in the dtype of q, softmax in float32.

    Arguments as in `reference_attention`. Returns out [B,T,H,D] in the dtype of q.
    """
    B, T, H, D = q.shape
    q_positions = _positions(q_positions, T)[:, None, :, None]
    k_positions = _positions(kv_positions, k.shape[1])[:, None, None, :]
    ahead = q_positions - k_positions
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = jax.lax.stop_gradient(jnp.asarray(alibi_slopes, jnp.float32))
        scores = scores - slopes[:, None, None] * jnp.abs(ahead)
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    p = _dense_softmax(scores, _dense_mask(ahead, causal, window, stride, segment_ids, kv_segment_ids), sinks)
    if dropout_rate > 0:
        batch, heads = jnp.arange(B)[:, None, None, None], jnp.arange(H)[:, None, None]
        keep = kept(dropout_rate, seeds_of(dropout_key), batch, heads, q_positions, k_positions)
        p = jnp.where(keep, p / (1 - dropout_rate), 0.0)
    return jnp.einsum("bhts,bshd->bthd", p.astype(q.dtype), v)


def _positions(positions, tokens: int) -> jax.Array:
    """int32 [B or 1, T], from [B,T], from [T], or from None for 0, 1, 2, ..."""
    return jnp.atleast_2d(jnp.arange(tokens) if positions is None else jnp.asarray(positions, jnp.int32))


def _dense_mask(ahead, causal: bool, window: int | None, stride: int | None, segment_ids, kv_segment_ids) -> jax.Array:
    """Bool [B or 1,1,T,S]: which query sees which key; `ahead`, of that shape, is how far it stands after the key."""
    mask = ahead >= 0 if causal else jnp.ones(ahead.shape, bool)
    if window is not None:
        mask = mask & (jnp.abs(ahead) < window)
    if stride is not None:
        mask = mask & ((jnp.abs(ahead) < stride) | (ahead % stride == 0))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])
    return mask


def _dense_softmax(scores_BHTS, mask, sinks) -> jax.Array:
    """float32 [B,H,T,S]; rows that see nothing are 0 and so are their gradients, as no row of -inf enters a softmax."""
    scores = jnp.where(mask, scores_BHTS, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(jnp.asarray(sinks, jnp.float32)[:, None, None], (*scores.shape[:-1], 1))
        return jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    sees = mask.any(-1, keepdims=True)
    return jnp.where(sees, jax.nn.softmax(jnp.where(sees, scores, 0.0), axis=-1), 0.0)


def errors(got, want) -> list[float]:
    """Relative errors of (out, dq, dk, dv), one by one."""
    return [relative_error(g, w) for g, w in zip(got, want, strict=True)]
