"""The oracle: dense attention and its gradients in float64 NumPy, written to be obviously right."""

import dataclasses
from typing import Any, Unpack

import numpy as np

from ring_attention.attention.dropout import seeds_of
from ring_attention.attention.mask import Mask
from ring_attention.attention.mask_args import MASK_DEFAULTS, MaskArgs, Window, lists_arguments, refuse_unknown
from ring_attention.attention.mask_spec import check_distance, check_mask_spec
from ring_attention.attention.token_args import check_token_args
from ring_attention.checks import require_attention_shapes, require_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Arguments:
    """What decides how much a query attends to a key, beside q and k; see `reference_attention`."""

    causal: bool = True
    window: Window = None
    stride: int | None = None
    segment_ids: Any = None  # arrays of NumPy or JAX
    kv_segment_ids: Any = None
    q_positions: Any = None
    kv_positions: Any = None
    softcap: float | None = None
    scale: Any = None  # a number
    sinks: Any = None
    alibi_slopes: Any = None
    dropout_rate: float = 0.0
    dropout_key: Any = None
    extra_mask: Mask | None = None
    intervals: Any = None
    kv_valid: Any = None
    kv_lengths: Any = None
    kv_bias: Any = None


@dataclasses.dataclass(frozen=True)
class _Weights:
    """How much each query attends to each key, and what the gradients need of how that came about.

    Attributes:
      p: float64 [B,H,T,S], the softmax; 0 where a query does not see a key.
      p_sink: float64 [B,H,T], the share of the sink; 0 where there is none.
      lse: float64 [B,H,T], log of the softmax's denominator, sink included; -inf where that is 0.
      dropped: what dropout multiplies p by, float64 [B,H,T,S], each 0 or 1 / (1 - rate); 1 without dropout.
      slope: derivative of the score by q.k, float64 [B,H,T,S]; one number where it is the same for all.
    """

    p: np.ndarray
    p_sink: np.ndarray
    lse: np.ndarray
    dropped: np.ndarray | float
    slope: np.ndarray | float


@lists_arguments(MASK_DEFAULTS)
def reference_attention(
    q,
    k,
    v,
    *,
    stride: int | None = None,
    kv_segment_ids=None,
    q_positions=None,
    kv_positions=None,
    return_lse: bool = False,
    **arguments: Unpack[MaskArgs],
):
    """Dense attention in float64; arguments as in `blockwise_attention`, arrays of any dtype.

    The score of a query and a key is softcap * tanh(scale * q.k / softcap) - slope * |q_position - k_position| +
    kv_bias. A query sees keys of its own segment, at its position or before if `causal`, less than `window` away from
    it, with `intervals` also those in its own or, unless `causal`, these alone, and with `stride` only those less than
    that away, or a multiple of it. Nobody sees keys that are not `kv_valid`, or at positions from `kv_lengths` on. The
    softmax is over the keys seen and the head's sink (`sinks` [H]), which has no value. Then weights are dropped.

    Returns:
      float64 out [B,T,H,D_v]; with `return_lse` also float64 lse [B,T,H]. out is 0 where a query sees no key, and lse
      is then the sink, or -inf without.

    Raises:
      ValueError: for values out of range and shapes that do not fit.
    """
    refuse_unknown(reference_attention, arguments)
    others: dict[str, Any] = dict(
        stride=stride, kv_segment_ids=kv_segment_ids, q_positions=q_positions, kv_positions=kv_positions
    )
    weights = _weigh(q, k, v, _Arguments(**arguments, **others))
    out = np.einsum("bhts,bshd->bthd", weights.p * weights.dropped, _expand(v, q))
    return (out, np.swapaxes(weights.lse, 1, 2)) if return_lse else out


def reference_gradients(q, k, v, dout, *, dlse=None, **arguments) -> tuple[np.ndarray, ...]:
    """float64 gradients (dq [B,T,H,D], dk [B,S,K,D], dv [B,S,K,D_v]) for the cotangent `dout` [B,T,H,D_v] of out.

    `dlse` [B,T,H] is that of lse, 0 by default. With `sinks` a fourth, dsinks [H]. `arguments` as in
    `reference_attention`; ALiBi's slopes have no gradient.
    """
    weights, dout = _weigh(q, k, v, _Arguments(**arguments)), _float64(dout)
    dv = np.einsum("bhts,bthd->bshd", weights.p * weights.dropped, dout)
    dp = np.einsum("bthd,bshd->bhts", dout, _expand(v, q)) * weights.dropped
    mean_BHT = (weights.p * dp).sum(-1)  # the sum of dout * out over D; the sink's own dp is 0
    if dlse is not None:  # the derivative of lse by a score, a sink's too, is the weight
        mean_BHT = mean_BHT - np.swapaxes(_float64(dlse), 1, 2)
    ds = weights.p * (dp - mean_BHT[..., None])
    dsinks_H = -(weights.p_sink * mean_BHT).sum((0, 2))
    dqk = ds * weights.slope
    dq = np.einsum("bhts,bshd->bthd", dqk, _expand(k, q))
    dk = np.einsum("bhts,bthd->bshd", dqk, _float64(q))
    gradients = dq, _sum_groups(dk, k), _sum_groups(dv, v)
    return gradients if arguments.get("sinks") is None else (*gradients, dsinks_H)


def _float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _expand(x_BSKD, q) -> np.ndarray:
    """Each key/value head repeated for the query heads that it serves."""
    return np.repeat(_float64(x_BSKD), q.shape[2] // x_BSKD.shape[2], axis=2)


def _sum_groups(grad_BSHD, x_BSKD) -> np.ndarray:
    B, S, K, D = x_BSKD.shape
    return grad_BSHD.reshape(B, S, K, -1, D).sum(3)


def _weigh(q, k, v, a: _Arguments) -> _Weights:
    """Scores, then mask, then softmax, then dropout."""
    require_attention_shapes(q, k, v)
    check_mask_spec(a.causal, a.window, a.softcap, a.scale, a.dropout_rate, a.dropout_key)
    check_distance("stride", a.stride)
    q_positions_BT, k_positions_BS = _positions(a.q_positions, q), _positions(a.kv_positions, k)
    check_token_args(vars(a), q.shape[0], q.shape[1], k.shape[1])
    ahead_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    s_BHTS, slope = _scores(q, k, ahead_BTS, a)
    seen_BTS = _mask(ahead_BTS, k_positions_BS, a)
    if a.extra_mask is not None:
        seen_BTS &= np.asarray(a.extra_mask.visible(q_positions_BT[:, :, None], k_positions_BS[:, None, :]))
    s_BHTS = np.where(seen_BTS[:, None], s_BHTS, -np.inf)
    p, p_sink, lse = _softmax(s_BHTS, _sinks(q, a))
    dropped = 1.0
    if a.dropout_rate > 0:
        seeds = np.asarray(seeds_of(a.dropout_key))
        kept = _kept(a.dropout_rate, seeds, q_positions_BT, k_positions_BS, q.shape[2])
        dropped = np.where(kept, 1 / (1 - a.dropout_rate), 0.0)
    return _Weights(p, p_sink, lse, dropped, slope)


def _positions(positions, x) -> np.ndarray:
    """int64 [B,T] for x [B,T,...], from [B,T], from [T], or from None for 0, 1, 2, ..."""
    positions = np.arange(x.shape[1]) if positions is None else np.asarray(positions)
    return np.broadcast_to(positions.astype(np.int64), x.shape[:2])


def _sinks(q, a: _Arguments) -> np.ndarray:
    """float64 [H]; to have no sink is to have one of -inf."""
    H = q.shape[2]
    if a.sinks is None:
        return np.full(H, -np.inf)
    require_shape("sinks", np.shape(a.sinks), (H,), "H")
    return _float64(a.sinks)


def _scores(q, k, ahead_BTS, a: _Arguments) -> tuple[np.ndarray, np.ndarray | float]:
    """(scores [B,H,T,S], their derivative by q.k)."""
    H, D = q.shape[2:]
    scale = D**-0.5 if a.scale is None else a.scale
    scores, slope = np.einsum("bthd,bshd->bhts", _float64(q), _expand(k, q)) * scale, scale
    if a.softcap is not None:
        tanh = np.tanh(scores / a.softcap)
        scores, slope = a.softcap * tanh, scale * (1 - tanh**2)
    if a.alibi_slopes is not None:
        require_shape("alibi_slopes", np.shape(a.alibi_slopes), (H,), "H")
        scores = scores - _float64(a.alibi_slopes)[:, None, None] * np.abs(ahead_BTS)[:, None]
    if a.kv_bias is not None:
        scores = scores + _float64(a.kv_bias)[:, None, None, :]
    return scores, slope


def _mask(ahead_BTS, k_positions_BS, a: _Arguments) -> np.ndarray:
    """Bool [B,T,S]: which query sees which key; `ahead_BTS` is how far the query stands after the key."""
    mask = np.ones(ahead_BTS.shape, bool)
    if a.causal:
        mask &= ahead_BTS >= 0
    if isinstance(a.window, tuple):
        left, right = (np.inf if x is None else x for x in a.window)
        mask &= (ahead_BTS <= left) & (-ahead_BTS <= right)
    elif a.window is not None:
        mask &= np.abs(ahead_BTS) < a.window
    if a.intervals is not None:
        start, stop = (np.asarray(x)[:, :, None] for x in a.intervals)
        inside = (start <= k_positions_BS[:, None, :]) & (k_positions_BS[:, None, :] < stop)
        mask = mask | inside if a.causal else mask & inside
    if a.kv_valid is not None:
        mask &= np.asarray(a.kv_valid)[:, None, :]
    if a.kv_lengths is not None:
        mask &= (k_positions_BS < np.asarray(a.kv_lengths)[:, None])[:, None, :]
    if a.stride is not None:
        mask &= (np.abs(ahead_BTS) < a.stride) | (ahead_BTS % a.stride == 0)
    if a.segment_ids is not None:
        of = np.asarray(a.segment_ids if a.kv_segment_ids is None else a.kv_segment_ids)
        B, T, S = ahead_BTS.shape
        require_shape("segment_ids", np.shape(a.segment_ids), (B, T), "BT")
        require_shape("segment_ids of the keys", of.shape, (B, S), "BS")
        mask &= np.asarray(a.segment_ids)[:, :, None] == of[:, None, :]
    return mask


def _softmax(s_BHTS, sinks_H) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights [B,H,T,S], weight of the sink [B,H,T], lse [B,H,T]): a sink is one more column of scores.

    Where all scores and the sink are -inf, weights are 0 and lse is -inf.
    """
    sinks_BHT1 = np.broadcast_to(sinks_H[:, None, None], (*s_BHTS.shape[:-1], 1))
    scores = np.concatenate([s_BHTS, sinks_BHT1], axis=-1)
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    p = e / np.where(total == 0, 1.0, total)
    return p[..., :-1], p[..., -1], lse[..., 0]


def _kept(rate: float, seeds, q_positions_BT, k_positions_BS, heads: int) -> np.ndarray:
    """Bool [B,H,T,S]: which weights dropout keeps, by the specification of `dropout.kept` in NumPy's uint32."""
    batch = np.arange(len(q_positions_BT)).astype(np.uint32)[:, None, None, None]
    head = np.arange(heads).astype(np.uint32)[:, None, None]
    query = q_positions_BT.astype(np.uint32)[:, None, :, None]
    key = k_positions_BS.astype(np.uint32)[:, None, None, :]
    a = _mix(_mix(_mix(seeds[0] + batch) + head) + query)
    b = _mix(_mix(_mix(seeds[1] + batch) + head) + query)
    bits = _mix(_mix(a + key) ^ b)
    return bits >= round(rate * 2**32)


def _mix(x):
    """The specification's `dropout.mix`; products of NumPy's uint32 arrays wrap around."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x21F0AAAD)
    x = x ^ (x >> 15)
    x = x * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)
