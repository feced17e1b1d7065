"""Attention of consecutive tokens that are not in a sharded cache yet: to those in it, and to each other."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.cached import Cache
from ring_attention.attention.device_kind import kind_here
from ring_attention.attention.mask_args import MASK_DEFAULTS, ScoreArgs, lists_arguments, refuse_unknown
from ring_attention.attention.mask_spec import checked_mask_args
from ring_attention.checks import require
from ring_attention.parallel.decode import attend_to_parts, tile_size


@lists_arguments(MASK_DEFAULTS)
def extend_attention_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Cache,
    *,
    first: int | jax.Array,
    slot_positions: jax.Array,
    axis_name: str = "sp",
    block_sizes: BlockSizes | None = None,
    **arguments: Unpack[ScoreArgs],
) -> jax.Array:
    """Attention of T consecutive tokens of each row to a cache of those before them, and to each other.

    For use inside a `shard_map`. They are not in the cache yet: one that is written in a circle would lose what the
    first of them see. Each device attends to its slots and to every P-th of the tokens; one all-gather of float32
    [B,T,H,D+1] brings the parts together.

    Args:
      q: [B,T,H,D], the same on all P devices of the axis, which T divides.
      k, v: [B,T,K,D], the same on all devices of the axis.
      cache: this device's slots.
      first: int32, the position of the first token, a multiple of P.
      slot_positions: int32 [B,s], as in `decode_attention_shard`.
      axis_name, block_sizes, others: as in `decode_attention_shard`.

    Returns:
      [B,T,H,D] in the dtype of q, the same on all devices of the axis.

    Raises:
      ValueError: for arguments that do not fit, before anything compiles.
    """
    refuse_unknown(extend_attention_shard, arguments)
    P, T = lax.axis_size(axis_name), q.shape[1]
    require(T % P == 0, f"q holds T={T} tokens, need a multiple of the {P} devices; pad them")
    positions = first + jnp.arange(T, dtype=jnp.int32)[None]
    piece = Cache(own_stripe(k, axis_name), own_stripe(v, axis_name))
    mask, size = checked_mask_args(arguments, q.shape[2]), tile_size(block_sizes, kind_here(q), q, cache)
    parts = [(cache, slot_positions), (piece, own_stripe(positions, axis_name))]
    positions = jnp.broadcast_to(positions, q.shape[:2])
    return attend_to_parts(q, parts, positions, axis_name=axis_name, size=size, mask=mask)


def own_stripe(x: jax.Array, axis_name: str) -> jax.Array:
    """Every P-th of the tokens of x [B,T,...], those of this device of the axis, [B,T/P,...]."""
    P, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    return lax.dynamic_index_in_dim(x.reshape(x.shape[0], -1, P, *x.shape[2:]), me, axis=2, keepdims=False)
