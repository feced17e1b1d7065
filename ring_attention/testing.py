"""Is attention exact? The float64 oracle, and checks of any implementation that you can run on your own devices.

The bound is a factor of two over the error of a dense implementation in the same dtype: a constant would be either too
loose for float32 or too tight for bfloat16, and would say nothing about what sharding the sequence costs.

    import ring_attention as ra

    ra.testing.check_devices()                      # every exact strategy, on all devices that JAX finds
    q, k, v, dout = ra.testing.random_qkv(0, B=2, T=256, H=4, K=2, D=32, dtype="bfloat16")
    ra.testing.assert_as_exact_as_dense(my_attention, q, k, v, dout, causal=True)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.dropout import kept, seeds_of
from ring_attention.attention.mask import Mask
from ring_attention.attention.mask_args import Window
from ring_attention.attention.reference import reference_attention, reference_gradients
from ring_attention.parallel.context import context_attention
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.strategies import STRATEGIES

__all__ = [
    "NAMES",
    "assert_as_exact_as_dense",
    "check_devices",
    "dense_attention",
    "dense_errors",
    "errors",
    "oracle",
    "out_and_gradients",
    "random_qkv",
    "random_segments",
    "reference_attention",
    "reference_gradients",
    "relative_error",
]

NAMES = ("out", "dq", "dk", "dv")
"""What is compared, in the order in which every function here gives it."""


def random_qkv(
    seed: int,
    B: int,
    T: int,
    H: int,
    K: int,
    D: int,
    dtype: str = "float32",
    S: int | None = None,
    D_v: int | None = None,
) -> list[jax.Array]:
    """Return normally distributed q [B,T,H,D], k [B,S,K,D] and v [B,S,K,D_v], and a cotangent of out [B,T,H,D_v].

    S is T by default, and D_v is D.
    """
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, D), (B, S or T, K, D), (B, S or T, K, D_v or D), (B, T, H, D_v or D)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def random_segments(seed: int, B: int, T: int, count: int = 4) -> np.ndarray:
    """Return segment ids, int32 [B,T], of `count` packed documents of random length, other lengths in each row."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.integers(1, count + 1, (B, T)), axis=1).astype(np.int32)


def relative_error(got, want) -> float:
    """Return the error of `got` in the Euclidean norm over that of `want`, computed in float64."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def out_and_gradients(fn, q, k, v, dout) -> tuple[jax.Array, ...]:
    """Return (out, dq, dk, dv) of fn(q, k, v) for the cotangent `dout`, compiled as one program."""

    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(fn, q, k, v)
        return out, *vjp(dout)

    return run(q, k, v, dout)


def oracle(q, k, v, dout, **mask) -> tuple[np.ndarray, ...]:
    """Return (out, dq, dk, dv) in float64; `mask` is keyword arguments of `reference_attention`."""
    return np.asarray(reference_attention(q, k, v, **mask)), *reference_gradients(q, k, v, dout, **mask)[:3]


def dense_attention(
    q,
    k,
    v,
    *,
    causal: bool = True,
    window: Window = None,
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
    dropout_key: Any = None,
    extra_mask: Mask | None = None,
    intervals=None,
    kv_valid=None,
    kv_lengths=None,
    kv_bias=None,
    return_lse: bool = False,
) -> Any:
    """Attend with the whole matrix of scores at once, as most people write it.

    Products are in the dtype of q, the softmax is in float32.

    Takes the arguments of `reference_attention`, and returns out [B,T,H,D_v] in the dtype of q, with `return_lse` also
    float32 lse [B,T,H].
    """
    B, T, H, D = q.shape
    q_positions = _positions(q_positions, T)[:, None, :, None]
    k_positions = _positions(kv_positions, k.shape[1])[:, None, None, :]
    ahead = q_positions - k_positions
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores * (D**-0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = jax.lax.stop_gradient(jnp.asarray(alibi_slopes, jnp.float32))
        scores = scores - slopes[:, None, None] * jnp.abs(ahead)
    if kv_bias is not None:
        scores = scores + jax.lax.stop_gradient(jnp.asarray(kv_bias, jnp.float32))[:, None, None]
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    mask = _dense_band(ahead, k_positions, causal, window, intervals)
    mask = mask & _dense_mask(ahead, k_positions, stride, segment_ids, kv_segment_ids, kv_valid, kv_lengths)
    if extra_mask is not None:
        mask = mask & extra_mask.visible(q_positions, k_positions)
    p = _dense_softmax(scores, mask, sinks)
    if dropout_rate > 0:
        batch, heads = jnp.arange(B)[:, None, None, None], jnp.arange(H)[:, None, None]
        keep = kept(dropout_rate, seeds_of(dropout_key), batch, heads, q_positions, k_positions)
        p = jnp.where(keep, p / (1 - dropout_rate), 0.0)
    out = jnp.einsum("bhts,bshd->bthd", p.astype(q.dtype), v)
    return (out, _dense_lse(scores, mask, sinks)) if return_lse else out


def _positions(positions, tokens: int) -> jax.Array:
    """int32 [B or 1, T], from [B,T], from [T], or from None for 0, 1, 2, ..."""
    return jnp.atleast_2d(jnp.arange(tokens) if positions is None else jnp.asarray(positions, jnp.int32))


def _dense_band(ahead, k_positions, causal: bool, window: Window, intervals) -> jax.Array:
    """Bool [B or 1,1,T,S]: what causal, window and intervals show; `ahead` is how far a query stands after a key."""
    mask = ahead >= 0 if causal else jnp.ones(ahead.shape, bool)
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window - 1, window - 1)
        mask = mask if left is None else mask & (ahead <= left)
        mask = mask if right is None else mask & (-ahead <= right)
    if intervals is not None:
        start, stop = (jnp.asarray(x)[:, None, :, None] for x in intervals)
        inside = (start <= k_positions) & (k_positions < stop)
        mask = mask | inside if causal else mask & inside
    return mask


def _dense_mask(ahead, k_positions, stride: int | None, segment_ids, kv_segment_ids, kv_valid, kv_lengths) -> jax.Array:
    """Bool [B or 1,1,T or 1,S]: what all other conditions leave."""
    mask = jnp.ones((1, 1, 1, 1), bool)
    if stride is not None:
        mask = (jnp.abs(ahead) < stride) | (ahead % stride == 0)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])
    if kv_valid is not None:
        mask = mask & jnp.asarray(kv_valid)[:, None, None, :]
    if kv_lengths is not None:
        mask = mask & (k_positions < jnp.asarray(kv_lengths)[:, None, None, None])
    return mask


def _dense_softmax(scores_BHTS, mask, sinks) -> jax.Array:
    """float32 [B,H,T,S]; rows that see nothing are 0 and so are their gradients, as no row of -inf enters a softmax."""
    scores = jnp.where(mask, scores_BHTS, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(jnp.asarray(sinks, jnp.float32)[:, None, None], (*scores.shape[:-1], 1))
        return jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    sees = mask.any(-1, keepdims=True)
    return jnp.where(sees, jax.nn.softmax(jnp.where(sees, scores, 0.0), axis=-1), 0.0)


def _dense_lse(scores_BHTS, mask, sinks) -> jax.Array:
    """float32 [B,T,H], the sinks included; -inf where a row sees nothing, whose gradients are 0."""
    sees = jnp.broadcast_to(mask, scores_BHTS.shape).any(-1)
    lse = jax.nn.logsumexp(jnp.where(sees[..., None], jnp.where(mask, scores_BHTS, -jnp.inf), 0.0), -1)
    lse = jnp.where(sees, lse, -jnp.inf)
    lse = lse if sinks is None else jnp.logaddexp(lse, jnp.asarray(sinks, jnp.float32)[:, None])
    return jnp.swapaxes(lse, 1, 2)


def errors(got, want) -> list[float]:
    """Return the relative errors of (out, dq, dk, dv), one by one."""
    return [relative_error(g, w) for g, w in zip(got, want, strict=True)]


def dense_errors(q, k, v, dout, **mask) -> list[float]:
    """Return the relative errors of (out, dq, dk, dv) of `dense_attention` against the oracle."""
    got = out_and_gradients(functools.partial(dense_attention, **mask), q, k, v, dout)
    return errors(got, oracle(q, k, v, dout, **mask))


def assert_as_exact_as_dense(attention, q, k, v, dout, *, limit: float = 2.0, **mask) -> dict[str, float]:
    """Assert that an attention is at most `limit` times as far from the oracle as a dense one in the same dtype.

    Args:
      attention: a function of (q, k, v) that returns out [B,T,H,D_v], or its (out, dq, dk, dv) themselves.
      q: queries [B,T,H,D]; k is [B,S,K,D], v [B,S,K,D_v], and dout, a cotangent of out, [B,T,H,D_v].
      limit: the largest ratio of the two errors.
      mask: keyword arguments of `reference_attention`, which `attention` must have, too.

    Returns:
      the ratio of the errors, ours to the dense one's, of each of NAMES.

    Raises:
      AssertionError: if one of out, dq, dk, dv is further off.
    """
    got = out_and_gradients(attention, q, k, v, dout) if callable(attention) else attention
    want, bounds = errors(got, oracle(q, k, v, dout, **mask)), dense_errors(q, k, v, dout, **mask)
    for name, error, bound in zip(NAMES, want, bounds, strict=True):
        if not error <= limit * bound:
            raise AssertionError(
                f"{name}: relative error {error:.2e}, dense has {bound:.2e}, {limit:g} times it allowed"
            )
    return {name: error / bound for name, error, bound in zip(NAMES, want, bounds, strict=True)}


def check_devices(
    strategies: Sequence[str] = ("ring", "all_gather", "ulysses"),
    *,
    dtype: str = "float32",
    impl: str = "auto",
    layout: str = "zigzag",
    tokens: int = 64,
    say: Callable[[str], object] = print,
) -> dict[str, float]:
    """Assert that strategies are exact on all devices that JAX finds here, forward and gradients; takes a minute.

    Args:
      strategies: names of exact ones in `STRATEGIES`.
      dtype: of q, k and v.
      impl: the kernel, "auto" for the one that would be chosen.
      layout: of the sequence, a name.
      tokens: of each device; the oracle needs time and memory for the square of the whole sequence.
      say: called with a line about each strategy.

    Returns:
      the largest ratio of our error to a dense implementation's for each strategy.

    Raises:
      ValueError: for a strategy that is unknown or not exact.
      AssertionError: if one is more than twice as far from the float64 oracle as a dense implementation.
    """
    for name in strategies:
        if name not in STRATEGIES or not STRATEGIES[name].exact:
            exact = ", ".join(name for name, strategy in STRATEGIES.items() if strategy.exact)
            raise ValueError(f"strategy={name!r} is not an exact strategy; choose from {exact}")
    mesh = make_mesh()
    P = mesh.size
    order, worst = SequenceLayout(layout, P), {}
    q, k, v, dout = random_qkv(0, B=1, T=P * tokens, H=2 * P, K=P, D=64, dtype=dtype)
    dealt = [order.permute(x, axis=1) for x in (q, k, v, dout)]
    for name in strategies:
        attention = functools.partial(context_attention, mesh=mesh, layout=order, strategy=name, impl=impl)
        got = [order.unpermute(x, axis=1) for x in out_and_gradients(attention, *dealt)]
        worst[name] = max(assert_as_exact_as_dense(got, q, k, v, dout).values())
        where = f"{P} x {mesh.devices.flat[0].device_kind}"
        say(f"{name}, {dtype}, {where}: {worst[name]:.2f} times dense attention's error")
    return worst
