"""What Tokamax's kernels are given, and how: heads second, whole blocks of tokens, one sequence or all of them.

Arrays that come in have heads first, [B,H,t,D], as everywhere here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ring_attention.attention.varying import vary_together

BLOCK = 128
"""Tokens are padded to a multiple of this, so that no kernel reads or writes beyond an array. Nobody sees padded keys,
and what padded queries give is dropped."""

LARGEST_HEAD_DIM = {9: 256, 10: 128}
"""By generation of GPU: Hopper, Blackwell. For larger ones the tiles below need more shared memory than there is."""

UNSEEING = 1e30
"""As lse of a padded query: its weights are then exp(score - lse) = 0."""

_MASKS = "bias mask k_start k_end is_causal logits_scale logits_soft_cap config"
ARGUMENTS = (
    f"q k v {_MASKS} out_dtype normalize_output return_residuals use_stable_softmax rescale_threshold",
    f"q k v residuals out dout {_MASKS} ds_dtype",
)
"""Of the kernel of the forward pass, and of that of the backward pass."""


class Setting(NamedTuple):
    """What a call knows beside its arrays.

    Attributes:
      causal: whether query number a sees the keys up to number a alone, of those in its range.
      scale: of the scores.
      softcap: scores x become softcap * tanh(x / softcap); None leaves them.
    """

    causal: bool
    scale: float
    softcap: float | None


def over_sequences(call: Callable, arrays, ranges):
    """The results of `call(*arrays, *ranges)` over arrays [B,H,t,...]: one call where all sequences have one mask.

    Heads of all sequences are then given as those of one. There is a call for each sequence where masks differ, since
    the kernel of the keys' gradients takes a mask for each head from another head where heads share keys.
    """
    B = arrays[0].shape[0]
    if all(x is None or x.shape[0] == 1 for x in ranges):
        results = call(*(x.reshape(-1, *x.shape[2:]) for x in arrays), *ranges)
        return tuple(x.reshape(B, -1, *x.shape[1:]) for x in results)
    ranges = [None if x is None else jnp.broadcast_to(x, (B, x.shape[1])) for x in ranges]
    each = [call(*(x[b] for x in arrays), *(x if x is None else x[b : b + 1] for x in ranges)) for b in range(B)]
    return tuple(map(jnp.stack, zip(*each, strict=True)))


def attend(kernel: Callable, q, k, v, first, last, setting: Setting):
    """(out [H,t,D], lse [H,t]) of q [H,t,D], k and v [K,s,D] and ranges [1,t]."""
    t, s = q.shape[1], k.shape[1]
    first, last = _padded_ranges(first, last, t, s)
    out, largest, total = kernel(*map(_tokens_first, (q, k, v)), first, last, setting=setting)
    lse = largest + jnp.log(total)  # -inf, and never NaN, of a query that sees nothing: its sum is 0
    return out[:t].swapaxes(0, 1), lse[:, :t]


def differentiate(kernel: Callable, q, out, lse, dout, k, v, first, last, setting: Setting):
    """(dq [H,t,D], dk, dv [K,s,D]) of arrays without a batch axis and ranges [1,t], given out and lse of all keys."""
    t, s = q.shape[1], k.shape[1]
    first, last = _padded_ranges(first, last, t, s)
    lse = jnp.pad(lse, ((0, 0), (0, -t % BLOCK)), constant_values=UNSEEING)
    q, k, v, out, dout = map(_tokens_first, (q, k, v, out, dout))
    dq, dk, dv = kernel(q, k, v, (lse, jnp.ones_like(lse)), out, dout, first, last, setting=setting)
    return tuple(x[:size].swapaxes(0, 1) for x, size in ((dq, t), (dk, s), (dv, s)))


def _tokens_first(x):
    """[t,H,D] of an array [H,t,D], padded to whole blocks."""
    return jnp.pad(x.swapaxes(0, 1), ((0, -x.shape[1] % BLOCK), (0, 0), (0, 0)))


def _padded_ranges(first, last, t: int, s: int):
    """The ranges of padded queries too, who see no key, and without padded keys; None where none is hidden."""
    if last is None and s % BLOCK:
        last = jnp.full((1, t), s, jnp.int32)
    return [None if x is None else jnp.pad(x, ((0, 0), (0, -t % BLOCK))) for x in (first, last)]


def in_triangles(differentiate: Callable, arrays, ranges, cuts: int):
    """(dq, dk, dv) in float32 of a causal tile, cut in two so often: full squares and small causal ones are left.

    `differentiate(causal)(arrays, ranges)` gives those of one of them; `arrays` are q, out, lse, dout, k and v.
    """
    if not cuts:
        return tuple(x.astype(jnp.float32) for x in differentiate(True)(arrays, ranges))
    half = arrays[0].shape[2] // 2

    def piece(later_queries: bool, later_keys: bool):
        rows, columns = (slice(half, None) if later else slice(half) for later in (later_queries, later_keys))
        offset, size = (half, arrays[4].shape[2] - half) if later_keys else (0, half)
        here = [x[:, :, rows] for x in arrays[:4]] + [x[:, :, columns] for x in arrays[4:]]
        return here, [None if x is None else jnp.clip(x[:, rows] - offset, 0, size) for x in ranges]

    upper, lower = (in_triangles(differentiate, *piece(later, later), cuts - 1) for later in (False, True))
    square = [x.astype(jnp.float32) for x in differentiate(False)(*piece(True, False))]
    dq = jnp.concatenate([upper[0], lower[0] + square[0]], 2)
    return dq, *(jnp.concatenate([upper[i] + square[i], lower[i]], 2) for i in (1, 2))


def launch_forward(library, generation: int, is_here: bool, arrays, setting: Setting):
    """(out, max, sum) by Tokamax's kernel; `is_here` says whether the GPU is, which then tells how large it is."""
    q, k, v, first, last = arrays

    def kernel(q, k, v, first, last):
        out, (largest, total) = library.flash_attention_kernel(
            q,
            k,
            v,
            **_masks(first, last, setting),
            out_dtype=q.dtype,
            normalize_output=True,
            return_residuals=True,
            use_stable_softmax=True,  # float16 has no room for the exp of a capped score
            rescale_threshold=1.0,
            config=forward_config(library, generation, q.shape[-1], is_here),
        )
        return out, largest, total

    return _untyped(kernel, q, k, v, first, last)


def launch_backward(library, generation: int, arrays, setting: Setting):
    """(dq, dk, dv) by Tokamax's kernels."""
    q, k, v, statistics, out, dout, first, last = arrays

    def kernel(q, k, v, statistics, out, dout, first, last):
        return library.flash_attention_vjp_kernel(
            q,
            k,
            v,
            residuals=statistics,
            out=out,
            dout=dout,
            **_masks(first, last, setting),
            ds_dtype=None,
            config=backward_config(library, generation, q.shape[-1]),
        )[:3]

    return _untyped(kernel, q, k, v, statistics, out, dout, first, last)


def _masks(first, last, setting: Setting) -> dict:
    """What both kernels are told of the scores, and of those that are hidden."""
    ranges = dict(bias=None, mask=None, k_start=first, k_end=last, is_causal=setting.causal)
    return ranges | dict(logits_scale=setting.scale, logits_soft_cap=setting.softcap)


def _untyped(kernel: Callable, *arrays):
    """The kernel's results, typed as varying like its arrays; inside of it JAX does not check such types."""
    from jax._src.config import _check_vma
    from jax.core import eval_jaxpr

    with _check_vma(False):
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        jaxpr, shapes = jax.make_jaxpr(kernel, return_shape=True)(*plain)
        results = eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(arrays))
    return vary_together(jax.tree.unflatten(jax.tree.structure(shapes), results), arrays)[0]


def forward_config(library, generation: int, head_dim: int, is_here: bool) -> Any:
    """The kernel's tiles. On an H100, D=128, these were the fastest; larger head dims get what fits into its memory."""
    if generation == 9:
        small = head_dim <= 128
        return library.Config(block_q=64, block_kv=128 if small else 64, num_stages=2, persistent=small and is_here)
    stages = 4 if head_dim <= 64 else 2
    return library.Config(block_q=128, block_kv=128, num_stages=stages, collective=False, persistent=False)


def backward_config(library, generation: int, head_dim: int) -> Any:
    """The same for the kernels of the backward pass."""
    if generation == 9:
        stages = 2 if head_dim <= 192 else 1
        return library.Config(block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=stages)
    block = 128 if head_dim <= 64 else 64
    return library.Config(block_q_dkv=block, block_kv_dkv=128, block_q_dq=128, block_kv_dq=block, num_stages=2)
