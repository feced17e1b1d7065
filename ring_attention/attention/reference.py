"""The oracle: dense attention and its gradients in float64 NumPy, written to be obviously right."""

import numpy as np

from ring_attention.checks import require_attention_shapes


def reference_attention(
    q,
    k,
    v,
    *,
    causal: bool = True,
    segment_ids=None,
    kv_segment_ids=None,
    q_positions=None,
    kv_positions=None,
    scale: float | None = None,
    return_lse: bool = False,
):
    """Dense attention in float64; arguments as in `blockwise_attention`.

    Returns:
      float64 out [B,T,H,D]; with `return_lse` also float64 lse [B,T,H].
    """
    require_attention_shapes(q, k, v)
    mask = _mask(q, k, causal, segment_ids, kv_segment_ids, q_positions, kv_positions)
    p_BHTS, lse_BHT = _softmax(_scores(q, k, scale), mask)
    out = np.einsum("bhts,bshd->bthd", p_BHTS, _expand(v, q))
    return (out, np.swapaxes(lse_BHT, 1, 2)) if return_lse else out


def reference_gradients(
    q,
    k,
    v,
    dout,
    *,
    causal: bool = True,
    segment_ids=None,
    kv_segment_ids=None,
    q_positions=None,
    kv_positions=None,
    scale: float | None = None,
):
    """float64 gradients (dq [B,T,H,D], dk [B,S,K,D], dv [B,S,K,D]) for the cotangent `dout` [B,T,H,D]."""
    mask = _mask(q, k, causal, segment_ids, kv_segment_ids, q_positions, kv_positions)
    p_BHTS, _ = _softmax(_scores(q, k, scale), mask)
    dout = _float64(dout)
    dp_BHTS = np.einsum("bthd,bshd->bhts", dout, _expand(v, q))
    ds_BHTS = p_BHTS * (dp_BHTS - (p_BHTS * dp_BHTS).sum(-1, keepdims=True)) * _scale(q, scale)
    dq = np.einsum("bhts,bshd->bthd", ds_BHTS, _expand(k, q))
    dk = np.einsum("bhts,bthd->bshd", ds_BHTS, _float64(q))
    dv = np.einsum("bhts,bthd->bshd", p_BHTS, dout)
    return dq, _sum_groups(dk, k), _sum_groups(dv, v)


def _float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _scale(q, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _expand(x_BSKD, q) -> np.ndarray:
    """Each key/value head repeated for the query heads that it serves."""
    return np.repeat(_float64(x_BSKD), q.shape[2] // x_BSKD.shape[2], axis=2)


def _sum_groups(grad_BSHD, x_BSKD) -> np.ndarray:
    B, S, K, D = x_BSKD.shape
    return grad_BSHD.reshape(B, S, K, -1, D).sum(3)


def _scores(q, k, scale: float | None) -> np.ndarray:
    return np.einsum("bthd,bshd->bhts", _float64(q), _expand(k, q)) * _scale(q, scale)


def _mask(q, k, causal, segment_ids, kv_segment_ids, q_positions, kv_positions) -> np.ndarray:
    """Bool [B,T,S]: which query sees which key."""
    (B, T), S = q.shape[:2], k.shape[1]
    mask = np.ones((B, T, S), bool)
    if causal:
        at = np.broadcast_to(np.arange(T) if q_positions is None else np.asarray(q_positions), (B, T))
        of = np.broadcast_to(np.arange(S) if kv_positions is None else np.asarray(kv_positions), (B, S))
        mask &= at[:, :, None] >= of[:, None, :]
    if segment_ids is not None:
        of = np.asarray(segment_ids if kv_segment_ids is None else kv_segment_ids)
        mask &= np.asarray(segment_ids)[:, :, None] == of[:, None, :]
    return mask


def _softmax(s_BHTS, mask_BTS) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, lse [B,H,T]); a row that sees nothing has probabilities 0 and lse -inf."""
    s_BHTS = np.where(mask_BTS[:, None], s_BHTS, -np.inf)
    top = s_BHTS.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0.0, top)
    e_BHTS = np.exp(s_BHTS - top)
    total = e_BHTS.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    return e_BHTS / np.where(total == 0, 1.0, total), lse[..., 0]
