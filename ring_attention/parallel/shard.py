"""Attention over a sequence that several devices hold, by any strategy: the front for one device's slices.

Here arguments are checked; how queries and keys are then brought together is the strategy's business.
"""

import dataclasses
import functools
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.device_kind import kind_here
from ring_attention.attention.mask_args import MASK_DEFAULTS, MaskArgs, Window, defaults_of, lists_arguments
from ring_attention.attention.mask_spec import as_sinks, check_distance, checked_mask_args, make_mask_spec
from ring_attention.attention.masks import Tokens
from ring_attention.attention.token_args import check_token_args, keys_of, segments_of_keys
from ring_attention.attention.varying import vary_together
from ring_attention.checks import (
    require,
    require_attention_dtypes,
    require_attention_shapes,
    require_integers,
)
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.kernel_choice import choose_context
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.sides import Sides, find_sides
from ring_attention.parallel.strategies import StrategyOptions, find_strategy
from ring_attention.parallel.strategy import Context, ShardTokens, Strategy


class ShardArgs(MaskArgs, StrategyOptions, total=False):
    """Keyword arguments of `context_attention_shard`, but for the strategy."""

    axis_name: str
    layout: str | SequenceLayout | DealtRows
    positions: jax.Array | None
    kv_layout: str | SequenceLayout | DealtRows | None
    kv_positions: jax.Array | None
    kv_segment_ids: jax.Array | None
    max_segment_len: int | None
    count_hops: bool
    batch_offset: int | jax.Array
    head_offset: int | jax.Array
    seq_len: int | None
    impl: str
    block_sizes: BlockSizes | None
    return_lse: bool


class MaskAndOptions(MaskArgs, StrategyOptions, total=False):
    """Keyword arguments that say what a query sees, and the options of the strategy."""


@lists_arguments(MASK_DEFAULTS)
@jax.named_scope("attention")
def context_attention_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    strategy: str | Strategy = "ring",
    axis_name: str = "sp",
    layout: str | SequenceLayout | DealtRows = "contiguous",
    positions: jax.Array | None = None,
    kv_layout: str | SequenceLayout | DealtRows | None = None,
    kv_positions: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    max_segment_len: int | None = None,
    count_hops: bool = True,
    batch_offset: int | jax.Array = 0,
    head_offset: int | jax.Array = 0,
    seq_len: int | None = None,
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
    return_lse: bool = False,
    **arguments: Unpack[MaskAndOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`context_attention` for use inside your own `shard_map`.

    A `vmap` with an axis name works too (not for USP), for rings larger than the machine; take gradients inside it,
    because JAX does not know the name any more when it differentiates from outside.

    Args:
      q: this device's slice [B,t,H,D] of the queries, in the layout's order; float32, bfloat16 or float16.
      k: this device's slice [B,s,K,D] of the keys, in the dtype of q; K divides H.
      v: this device's slice [B,s,K,D_v] of the values.
      strategy: a name from `STRATEGIES`, or one of its values with other options.
      axis_name: the axis that the sequence is sharded over.
      layout: the order in which tokens were dealt to devices: a name, a SequenceLayout or DealtRows.
      positions: this device's slice, integers [t] or [B,t], in place of those of a layout; as in `context_attention`.
      kv_layout, kv_positions, kv_segment_ids: those of keys of another sequence; the last two are this device's slices,
        [B,s]. As in `context_attention`.
      count_hops: a ring counts as it runs how many hops segment ids and other arrays ask for. False: as many as layout
        and mask alone need, which a compiler hides to the last; for documents that are long beside a shard.
      causal, window, max_segment_len, softcap, scale: as in `context_attention`, and so are dropout_rate,
        dropout_key and extra_mask.
      segment_ids: this device's slice, integers [B,t]; a token sees its own segment only.
      intervals, kv_valid, kv_bias: this device's slices, [B,t] and, the last two, [B,s]; kv_lengths: [B]; as in
        `context_attention`.
      sinks: those of this device's heads, [H].
      alibi_slopes: those of this device's heads, [H].
      batch_offset: global index of this device's first sequence, by which dropout counts.
      head_offset: global index of this device's first head, by which dropout counts.
      seq_len: tokens of the whole sequence that are real; those at positions from here on are padding. All by default.
        Where keys are of another sequence, `kv_lengths` says it.
      impl: name of the kernel that computes tiles, or "auto": the fastest that can do this on these devices.
      block_sizes: sizes of the kernel's tiles; chosen for the kernel and the device by default.
      return_lse: also return the lse.
      **options: of the strategy.

    Returns:
      This device's slice [B,t,H,D_v] of the output, in the dtype of q; 0 where a query sees no key. With `return_lse`
      also its slice of the lse, float32 [B,t,H], -inf there.

    Raises:
      ValueError: for shapes, dtypes, values or names that do not fit, before anything compiles.
    """
    require_attention_shapes(q, k, v)
    require_attention_dtypes(q, k, v)
    P, of_keys = _axis_size(axis_name), (kv_layout, kv_positions, kv_segment_ids)
    shard = functools.partial(lax.axis_index, axis_name)
    sides, *places = find_sides(q.shape, k.shape, P, layout, positions, of_keys, shard=shard)
    require(not sides.cross or seq_len is None, "seq_len is of one sequence, and keys are of another; give kv_lengths")
    mask, options = mask_and_options(arguments, q.shape, k.shape, sides, kv_segment_ids, max_segment_len, "Bts")
    strategy = find_strategy(strategy, options, context_attention_shard)
    offsets = dict(batch_offset=batch_offset, head_offset=head_offset, seq_len=seq_len)
    context = choose_context(
        strategy,
        impl,
        block_sizes,
        axis_name=axis_name,
        layout=sides.together,
        kind=kind_here(q),
        shape=(*q.shape[:3], max(q.shape[3], v.shape[3])),
        return_lse=return_lse,
        dtype=q.dtype,
        kv_heads=k.shape[2],
        make_mask=functools.partial(make_mask_spec, q, **mask, **offsets),
    )
    context = dataclasses.replace(context, count_hops=count_hops)
    arrays = arrays_of_shard(strategy, context, q, k, v, mask, places, **offsets)
    out, lse = (jnp.swapaxes(x, 1, 2) for x in strategy.attend(context, *arrays))
    return (out, lse) if return_lse else out


def mask_and_options(
    arguments,
    q_shape: tuple[int, ...],
    k_shape,
    sides: Sides,
    kv_segment_ids,
    max_segment_len: int | None,
    letters: str,
):
    """(checked arguments of the mask with "kv_segment_ids", the strategy's options); `letters` name B, T and S."""
    options = {name: value for name, value in arguments.items() if name not in MASK_DEFAULTS}
    mask = {name: value for name, value in arguments.items() if name in MASK_DEFAULTS}
    segment_ids = mask.get("segment_ids")
    if segment_ids is not None:
        require_integers("segment_ids", segment_ids, q_shape[:2], letters[:2])
    if sides.cross:
        segments_of_keys(segment_ids, kv_segment_ids, q_shape[1], k_shape[1])
        remedy = "give kv_segment_ids [B,S] as well"
        missing = segment_ids is not None and kv_segment_ids is None
        require(not missing, f"segment_ids are in the order of the queries, and keys have their own; {remedy}")
        if kv_segment_ids is not None:
            require_integers("kv_segment_ids", kv_segment_ids, k_shape[:2], letters[0] + letters[2])
        words = "max_segment_len bounds segments of one sequence, and keys are of another"
        require(max_segment_len is None, f"{words}; leave it out: keys are sent no farther than the segments need")
    check_token_args(mask, q_shape[0], q_shape[1], k_shape[1], letters[1:])
    mask = checked_mask_args(mask, q_shape[2], traced_scale=True)
    window = _shorter(mask["window"], max_segment_len, segment_ids)
    return mask | dict(window=window, kv_segment_ids=kv_segment_ids), options


def arrays_of_shard(strategy: Strategy, context: Context, q, k, v, mask: dict, places, **offsets) -> tuple:
    """What `Strategy.attend` takes, of a device's slices q [B,t,H,D], k [B,s,K,D], v [B,s,K,D_v]: heads before tokens.

    `places` are positions of queries and of keys, None where the layout tells them or, of keys, where they are those of
    the queries. Raises ValueError for what the kernel or the strategy cannot do.
    """
    (B, t, H, D), s = q.shape, k.shape[1]
    own = _tokens(places[0], mask["segment_ids"])
    of_keys = own if places[1] is None else _tokens(places[1], mask["kv_segment_ids"])
    spec = make_mask_spec(q, **mask, **offsets)
    context.kernel.check(spec, jax.ShapeDtypeStruct((B, H, t, max(D, v.shape[3])), q.dtype))
    strategy.check(context, (B, t, H, D), k.shape[2], spec)
    me = lax.axis_index(context.axis_name)
    more = _more_of_tokens(mask, context.placed(of_keys, me, s).positions, (B, t))
    same, given = of_keys is own, (own, None if of_keys is own else of_keys)
    q, k, v, given, more, spec, sinks, _ = vary_together(q, k, v, given, more, spec, as_sinks(mask["sinks"]), me)
    sides = (given[0], given[0] if same else given[1])
    queries, keys = (dataclasses.replace(x, **fields) if fields else x for x, fields in zip(sides, more, strict=True))
    tokens = strategy.prepared(context, ShardTokens(queries=queries, keys=keys, mask=spec), s)
    return *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), tokens, sinks


def _tokens(positions, segments) -> Tokens:
    return Tokens(*(None if x is None else x.astype(jnp.int32) for x in (positions, segments)))


def _more_of_tokens(mask: dict, positions, shape: tuple[int, int]) -> tuple[dict, dict]:
    """Fields of `Tokens` beside positions and segments, of queries and of keys, which travel with them: [B,t]."""
    low_high = mask["intervals"] or ()
    of_queries = {
        name: jnp.broadcast_to(x, shape).astype(jnp.int32) for name, x in zip(("low", "high"), low_high, strict=False)
    }
    real, bias = keys_of(positions, mask)
    return of_queries, {name: x for name, x in (("real", real), ("bias", bias)) if x is not None}


def _axis_size(axis_name: str) -> int:
    """Devices along an axis of the shard_map, or vmap, that this is called in."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        where = f"axis_name={axis_name!r} has no meaning here, need the name of an axis that jax.shard_map goes over"
        raise ValueError(f"{where}; call it inside a shard_map, or give it whole arrays as context_attention") from None


def _shorter(window: Window, max_segment_len: int | None, segment_ids) -> Window:
    """The window that both bounds make."""
    if max_segment_len is None:
        return window
    require(
        segment_ids is not None,
        f"max_segment_len={max_segment_len} bounds segments, but there are none; give segment_ids, or window instead",
    )
    check_distance("max_segment_len", max_segment_len)
    if isinstance(window, tuple):
        left, right = (max_segment_len - 1 if x is None else min(x, max_segment_len - 1) for x in window)
        return left, right
    return max_segment_len if window is None else min(window, max_segment_len)


@lists_arguments(defaults_of(context_attention_shard, but=("strategy",)))
def ring_attention_shard(
    q: jax.Array, k: jax.Array, v: jax.Array, **arguments: Unpack[ShardArgs]
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`ring_attention` for use inside your own `shard_map`: `context_attention_shard` by ring, with its arguments."""
    return context_attention_shard(q, k, v, strategy="ring", **arguments)
