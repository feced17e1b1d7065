"""Attention on one device in O(T) memory: one pair of query and key blocks, with its own VJP."""

import dataclasses
import functools
from typing import Unpack

import jax
import jax.numpy as jnp

from ring_attention.attention import sinks as attention_sinks
from ring_attention.attention.axis_types import type_of, with_auto_axes
from ring_attention.attention.blocks import BlockSizes, as_blocks
from ring_attention.attention.derivatives import differentiated_once, only_reverse_mode
from ring_attention.attention.device_kind import kind_here
from ring_attention.attention.kernels.choose import choose_kernel
from ring_attention.attention.kernels.contract import GlobalStats, Kernel, require_lse
from ring_attention.attention.kernels.tile_sizes import tiles_of
from ring_attention.attention.mask_args import MASK_DEFAULTS, MaskArgs, lists_arguments, refuse_unknown
from ring_attention.attention.mask_spec import as_sinks, checked_mask_args, make_mask_spec, scale_gradient
from ring_attention.attention.masks import BlockPair, Tokens
from ring_attention.attention.on_shards import Shards, on_shards, shards_of
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.rounding import rounded
from ring_attention.attention.token_args import (
    check_positions,
    check_token_args,
    key_tokens,
    query_tokens,
    runs_of,
    segments_of_keys,
)
from ring_attention.attention.varying import vary_together
from ring_attention.checks import require_attention_dtypes, require_attention_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    kernel: Kernel
    blocks: BlockSizes


@lists_arguments(MASK_DEFAULTS)
def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    kv_segment_ids: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
    return_lse: bool = False,
    **arguments: Unpack[MaskArgs],
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention on one device, a tile of scores at a time (Rabe & Staats 2021; Dao et al. 2022).

    Arrays that are sharded give the right result. Batch and heads stay on their devices where it is known what shards
    them: Explicit axes, arrays outside `jit`, and Auto axes called dp, fsdp (batch) and tp (heads). What other axes
    shard is gathered, and the log says so: call it inside a `shard_map` over them, and `context_attention` where the
    sequence is sharded.

    Which query (row) sees which key (column), T = S = 5:

        causal=True      window=2         causal=False     segment_ids
                                          window=2         [0,0,0,1,1]
        1 0 0 0 0        1 0 0 0 0        1 1 0 0 0        1 0 0 0 0
        1 1 0 0 0        1 1 0 0 0        1 1 1 0 0        1 1 0 0 0
        1 1 1 0 0        0 1 1 0 0        0 1 1 1 0        1 1 1 0 0
        1 1 1 1 0        0 0 1 1 0        0 0 1 1 1        0 0 0 1 0
        1 1 1 1 1        0 0 0 1 1        0 0 0 1 1        0 0 0 1 1

    Args:
      q: [B,T,H,D], float32, bfloat16 or float16.
      k: [B,S,K,D] in the dtype of q; K divides H, each key/value head serving H/K query heads. S may differ from T.
      v: [B,S,K,D_v]; D_v may differ from D. As in dense attention, hidden keys and values must be finite, too: 0 times
        NaN is NaN. What is not reaches all queries that see it and may reach others of the same sequence and head, by
        tiles.
      causal: a query sees the keys at its own position and before; otherwise all of them.
      window: a query sees itself and the window-1 positions before it, and after it where causal is False; or
        (left, right), which is so many before and after it, None for all of them.
      segment_ids: integers [B,T]; a query sees the keys of its own segment only.
      kv_segment_ids: integers [B,S], those of the keys; `segment_ids` where T = S.
      q_positions: integers [T] or [B,T], nearer to 0 than 2**30, for masks, ALiBi and dropout; 0, 1, 2, ... by default.
      kv_positions: integers [S] or [B,S].
      softcap: scores x become softcap * tanh(x / softcap).
      scale: of the products of queries and keys; D**-0.5 by default. A number, or a floating array [] that is traced,
        to which a gradient flows.
      sinks: [H], a logit for each head that takes part in the softmax but has no value; can be differentiated.
      alibi_slopes: [H]; a score falls by the slope for each position of distance. Constants: no gradient flows to them.
      dropout_rate: of weights; which ones depends on their batch row, head and positions alone, not on tile sizes.
      dropout_key: a `jax.random` key, needed with dropout.
      extra_mask: a `Mask`, a further condition on positions; a query sees the keys that it shows, too.
      intervals: `ra.Intervals` or (start, stop), integers [B,T] or [1,T], the positions from `start` to before `stop`
        that each query sees: beside what `causal` and `window` show, or, where causal is False, of what these show.
      kv_valid: bool [B,S], False for keys that nobody sees, such as padding.
      kv_lengths: integers [B]; keys at positions from here on are not seen.
      kv_bias: floats [B,S], added to the scores of a key; -inf hides it. Constants: no gradient flows to them.
      impl: name of a kernel, or "auto": the fastest that can do this on these devices (docs/kernels.md).
      block_sizes: sizes of a tile; chosen for the kernel and the device by default.
      return_lse: also return the lse.

    Returns:
      out [B,T,H,D_v] in the dtype of q; 0, with zero gradients, where a query sees no key. With `return_lse` also the
      natural logarithm of the sum of exponentials, float32 [B,T,H], -inf there. Both can be differentiated.

    Raises:
      ValueError: for shapes, dtypes, values or names that do not fit, before anything compiles.
    """
    refuse_unknown(blockwise_attention, arguments)
    require_attention_shapes(q, k, v)
    require_attention_dtypes(q, k, v)
    (B, T, H, D), S, segment_ids = q.shape, k.shape[1], arguments.get("segment_ids")
    kv_segment_ids = segments_of_keys(segment_ids, kv_segment_ids, T, S)
    check_positions("q", q_positions, segment_ids, B, T)
    check_positions("kv", kv_positions, kv_segment_ids, B, S)
    check_token_args(arguments, B, T, S)
    kind, checked = kind_here(q), checked_mask_args(arguments, H, traced_scale=True)
    make_mask = functools.partial(make_mask_spec, q, **checked)
    queries, keys = (Tokens(None, runs=runs_of(x, length)) for x, length in ((q_positions, T), (kv_positions, S)))

    def accepts(kernel: Kernel) -> None:
        mask = jax.eval_shape(make_mask)
        kernel.check(mask, jax.ShapeDtypeStruct((B, H, T, max(D, v.shape[3])), q.dtype))
        require_lse(kernel, return_lse)
        kernel.check_pair(BlockPair(queries, keys, mask))

    kernel = choose_kernel(impl, kind, accepts)
    accepts(kernel)
    blocks = as_blocks(block_sizes, tiles_of(kernel.name, kind, max(D, v.shape[3]), H // k.shape[2]))
    queries = query_tokens(q_positions, segment_ids, T, arguments.get("intervals"))
    pair = BlockPair(queries, key_tokens(kv_positions, kv_segment_ids, S, arguments), make_mask())
    sinks = as_sinks(checked["sinks"])
    static = _Static(kernel=kernel, blocks=blocks), shards_of(q, k, (v, pair, sinks))
    q, k, v, pair, sinks = vary_together(q, k, v, pair, sinks)
    args = (*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), pair, sinks)
    with only_reverse_mode():
        out, lse = with_auto_axes(_attend_shards, static, args, type_of(args[0], args[1:]))
    out, lse = jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)
    return (out, lse) if return_lse else out


def _attend_shards(static_and_shards: tuple[_Static, Shards | None], *args):
    static, shards = static_and_shards
    return _attend(static, *args) if shards is None else on_shards(_attend, static, shards, args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q, k, v, pair: BlockPair, sinks):
    """Out [B,H,T,D_v] and lse [B,H,T]; all arrays have heads before tokens."""
    out, _, lse = _finished(static, q, k, v, pair, sinks)
    return out, lse


def _finished(static: _Static, q, k, v, pair: BlockPair, sinks):
    """(out, what rounding took from it, lse), undecorated: the forward rule must let tangents through, for Hessians."""
    state = static.kernel.forward(q, k, v, pair, SoftmaxState.before(q, v), static.blocks)
    out, lse = attention_sinks.finalize(state, sinks)
    return *rounded(out, q.dtype, keep=static.kernel.float32_out), lse


def _attend_forward(static: _Static, q, k, v, pair: BlockPair, sinks):
    out, rounding, lse = _finished(static, q, k, v, pair, sinks)
    return (out, lse), (q, k, v, out, rounding, lse, pair, sinks)


def _attend_backward(static: _Static, residuals, cotangents):
    q, k, v, out, rounding, lse, pair, sinks = residuals
    stats = GlobalStats.of(out, lse, *cotangents, rounding=rounding)
    nothing = vary_together(jnp.zeros(q.shape, jnp.float32), q)[0]
    grads = static.kernel.backward(q, k, v, stats, pair, nothing, static.blocks)
    of_scale = scale_gradient(pair.mask, q, grads[0])
    of_pair = None if of_scale is None else dataclasses.replace(pair, queries=None, keys=None, mask=of_scale)
    grads = (differentiated_once(grad.astype(q.dtype)) for grad in grads)
    return *grads, of_pair, attention_sinks.gradient(sinks, stats)


_attend.defvjp(_attend_forward, _attend_backward)
