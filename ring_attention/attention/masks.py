"""The one mask rule: which query sees which key is a function of their positions and segments, in any layout."""

import dataclasses

import jax
import jax.numpy as jnp

EMPTY, PARTIAL, FULL = 0, 1, 2
"""Kinds of tile: no query sees a key, some do, every query sees every key."""

PADDED_QUERY, PADDED_KEY = -(2**31) + 1, -(2**31)
"""Segments of the tokens that fill up a tile: unlike any other and unlike each other, so nobody sees them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where tokens stand.

    Attributes:
      positions: int32 [B or 1, t], natural positions in the sequence.
      segments: int32 [B, t], or None where all tokens are of one segment.
    """

    positions: jax.Array
    segments: jax.Array | None = None

    def pad(self, amount: int, segment: int) -> "Tokens":
        """The same tokens and `amount` more, in a segment of their own."""
        segments = jnp.zeros_like(self.positions) if self.segments is None else self.segments
        return Tokens(
            jnp.pad(self.positions, ((0, 0), (0, amount)), mode="edge"),
            jnp.pad(segments, ((0, 0), (0, amount)), constant_values=segment),
        )

    def tiles(self, batch: int, size: int) -> "Tokens":
        """The tokens cut into tiles of `size`: arrays [batch, n, size]."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, x.shape[1])).reshape(batch, -1, size), self)

    def __getitem__(self, index) -> "Tokens":
        return jax.tree.map(lambda x: x[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hop:
    """What a kernel must know of one meeting of queries and keys: where they stand, and the rule.

    Attributes:
      queries: of the resident shard.
      keys: of the visiting shard.
      causal: a query sees its own position and those before it; otherwise all of them.
    """

    queries: Tokens
    keys: Tokens
    causal: bool = dataclasses.field(metadata={"static": True})


def visible(hop: Hop) -> jax.Array | None:
    """Bool [..., t, s]: which query sees which key; None where the rule hides nothing."""
    mask = None
    if hop.causal:
        mask = hop.queries.positions[..., :, None] >= hop.keys.positions[..., None, :]
    if hop.queries.segments is not None:
        same = hop.queries.segments[..., :, None] == hop.keys.segments[..., None, :]
        mask = same if mask is None else mask & same
    return mask


def tile_kinds(hop: Hop) -> jax.Array:
    """int32 [..., n, m]: EMPTY, PARTIAL or FULL for each pair of n query tiles and m key tiles.

    `hop` holds tiles, [..., n, size]. The kinds come from the bounds of positions and segments in each tile, so an
    EMPTY or FULL is proved, while a PARTIAL may hide more than it seems.
    """

    def bounds(x, axis):
        return jnp.expand_dims(x.min(-1), axis), jnp.expand_dims(x.max(-1), axis)

    q_low, q_high = bounds(hop.queries.positions, -1)
    k_low, k_high = bounds(hop.keys.positions, -2)
    empty = (q_high < k_low) if hop.causal else jnp.zeros_like(q_high < k_low)
    full = (q_low >= k_high) if hop.causal else ~empty
    if hop.queries.segments is not None:
        q_first, q_last = bounds(hop.queries.segments, -1)
        k_first, k_last = bounds(hop.keys.segments, -2)
        empty |= (q_last < k_first) | (k_last < q_first)
        full &= (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL))
