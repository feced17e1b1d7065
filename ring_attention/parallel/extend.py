"""Attention of consecutive tokens to a sharded cache of those before them, and to each other."""

import functools
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

QUERIES = 256
"""Tokens whose scores with a tile of slots, and whose outputs of all devices, exist at once."""


@lists_arguments(MASK_DEFAULTS)
def extend_attention_shard(
    q: jax.Array,
    cache: Cache,
    *,
    own: tuple[jax.Array, jax.Array] | None = None,
    first: int | jax.Array,
    slot_positions: jax.Array,
    axis_name: str = "sp",
    block_sizes: BlockSizes | None = None,
    **arguments: Unpack[ScoreArgs],
) -> jax.Array:
    """Attention of T consecutive tokens of each row to a cache of those before them, and to each other.

    For use inside a `shard_map`. A cache that is written in a circle must not hold them yet: it would have lost what
    the first of them see. Each device attends to its slots and to every P-th of `own`, some queries at a time; together
    float32 [P,B,T,H,D+1] are gathered to bring the parts together.

    Args:
      q: [B,T,H,D], the same on all P devices of the axis, which T divides.
      cache: this device's slots.
      own: keys and values [B,T,K,D] of the tokens, the same on all devices of the axis; None: they are in the cache.
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
    mask, size = checked_mask_args(arguments, q.shape[2]), tile_size(block_sizes, kind_here(q), q, cache)
    parts = [(cache, slot_positions)]
    if own is not None:
        k, v, places = (own_stripe(x, axis_name) for x in (*own, positions))
        parts.append((Cache(k, v), places))
    attend = functools.partial(attend_to_parts, parts=parts, axis_name=axis_name, size=size, mask=mask)
    if T <= QUERIES:
        return attend(q, q_positions=jnp.broadcast_to(positions, q.shape[:2]))
    padded = jnp.pad(q, ((0, 0), (0, -T % QUERIES), (0, 0), (0, 0)))

    def some(start):
        at = jnp.broadcast_to(first + start + jnp.arange(QUERIES, dtype=jnp.int32), (q.shape[0], QUERIES))
        return attend(lax.dynamic_slice_in_dim(padded, start, QUERIES, axis=1), q_positions=at)

    out = lax.map(some, jnp.arange(0, padded.shape[1], QUERIES, dtype=jnp.int32))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :T]


def own_stripe(x: jax.Array, axis_name: str) -> jax.Array:
    """Every P-th of the tokens of x [B,T,...], those of this device of the axis, [B,T/P,...]."""
    P, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    return lax.dynamic_index_in_dim(x.reshape(x.shape[0], -1, P, *x.shape[2:]), me, axis=2, keepdims=False)
