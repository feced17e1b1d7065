"""Cuts a block of queries and a block of keys into tiles, and lists those that the mask leaves to compute.

Arrays of queries are [B,K,G,t,...], of keys [B,K,s,...], of a tile the same without B and with fewer heads and tokens.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.masks import EMPTY, FULL, PARTIAL, BlockPair, Bounds, Tokens, in_rows, kinds_between

GROUP = 64
"""Lists of what a tile of queries visits are for so many key tiles at most, so that memory is linear in tokens."""


class Tile(NamedTuple):
    """A rectangle of scores: sequence `b`, heads from `h` on, queries from `q` on, keys from `kv` on.

    How many there are of each is static, and so is whether the mask may hide some of the scores.
    """

    b: jax.Array
    h: jax.Array
    q: jax.Array
    kv: jax.Array | np.integer
    heads: int
    q_size: int
    kv_size: int
    masked: bool

    def of_queries(self, x_BKGt):
        """[h,G,t,...] of an array of queries."""
        return _read(x_BKGt, (self.b, self.h, 0, self.q), (1, self.heads, x_BKGt.shape[2], self.q_size))[0]

    def into_queries(self, x_BKGt, new_hGt):
        """The array with these queries replaced."""
        return _write(x_BKGt, new_hGt[None], (self.b, self.h, 0, self.q))

    def of_keys(self, x_BKs):
        """[h,s,...] of an array of keys."""
        return _read(x_BKs, (self.b, self.h, self.kv), (1, self.heads, self.kv_size))[0]

    def of_columns(self, x_BKDs):
        """[h,D,s] of an array whose last axis are keys."""
        return _read(x_BKDs, (self.b, self.h, 0, self.kv), (1, self.heads, x_BKDs.shape[2], self.kv_size))[0]

    def into_columns(self, x_BKDs, new_hDs):
        """The array with these keys replaced."""
        return _write(x_BKDs, new_hDs[None], (self.b, self.h, 0, self.kv))

    def of_row(self, x, axis: int, row: "Tile"):
        """The tile's queries, which stand on `axis`, of an array with all queries of `row`."""
        if self.q_size == row.q_size:
            return x
        return lax.dynamic_slice_in_dim(x, self.q - row.q, self.q_size, axis)

    def into_row(self, x, new, axis: int, row: "Tile"):
        """The array of `row` with the tile's queries replaced."""
        if self.q_size == row.q_size:
            return new
        return lax.dynamic_update_slice_in_dim(x, new, self.q - row.q, axis)


class Sizes(NamedTuple):
    """What a tile holds: tokens, into how many pieces each side is cut where the mask cuts it, key/value heads."""

    q: int
    kv: int
    cut_q: int
    cut_kv: int
    heads: int


class Worklist(NamedTuple):
    """What a loop visits: the first `count` [...] of the numbers `items` [...,n]."""

    items: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (a tuple's method, which nobody needs)

    @staticmethod
    def of(wanted: jax.Array) -> "Worklist":
        """Numbers of those that are True in bool [...,n]."""
        numbers = jnp.arange(wanted.shape[-1], dtype=jnp.int32)
        return Worklist(jnp.sort(jnp.where(wanted, numbers, numbers.size)), wanted.sum(-1, dtype=jnp.int32))


class Visits(NamedTuple):
    """What a tile of queries visits of one group of key tiles.

    Attributes:
      start: number of the first key tile of the group.
      full: those that are computed uncut and without a mask.
      parts: pieces of those that the mask cuts, numbered tile after tile, in a tile by query and then key.
    """

    start: jax.Array
    full: Worklist
    parts: Worklist


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiling:
    """The tiles of a block pair, as a loop over query tiles visits them.

    There are lists of what to visit rather than a branch in the loop, because a branch copies what it passes through.
    They are made inside the loop, from the bounds of tiles: for all pairs of tiles at once they would be quadratic.

    Attributes:
      pair: with tokens [B,t] and [B,s], padded to whole tiles.
      queries: bounds of the pieces of n query tiles, [B,n,cut_q].
      keys: bounds of the pieces of m key tiles, [B,m,cut_kv].
      slopes: float32 [K,G] or None, ALiBi's.
      heads: int32 [K,G] or None, global indices of query heads, for dropout.
      size: of a tile.
      num_kv_heads: K.
    """

    pair: BlockPair
    queries: Bounds
    keys: Bounds
    slopes: jax.Array | None
    heads: jax.Array | None
    size: Sizes = dataclasses.field(metadata={"static": True})
    num_kv_heads: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(pair: BlockPair, q_BHtD: jax.Array, k_BKsD: jax.Array, blocks: BlockSizes) -> "Tiling":
        """Cut the pair of these queries and keys into tiles."""
        (B, _, t, _), (_, K, s, _) = q_BHtD.shape, k_BKsD.shape
        q, kv = _tile_size(t, blocks.q), _local_tile(t, blocks) if pair.diagonal else _tile_size(s, blocks.kv)
        size = Sizes(q, kv, math.gcd(blocks.cut, q), math.gcd(blocks.cut, kv), math.gcd(blocks.heads, K))
        queries, keys, mask = pair.queries, pair.keys, pair.mask
        # Bounds that are constants, where they can be: XLA then drops loops that it knows to visit nothing.
        bounds = [
            Bounds.of(tokens.known().pad(-length % tile).tiles(tile // cut))
            for tokens, length, tile, cut in ((queries, t, q, size.cut_q), (keys, s, kv, size.cut_kv))
        ]
        bounds = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, x.shape[1])), bounds)
        pair = BlockPair(queries.pad(-t % q).of_batch(B), keys.pad(-s % kv).of_batch(B), mask)
        return Tiling(
            pair=pair,
            queries=jax.tree.map(lambda x: in_rows(x, size.cut_q), bounds[0]),
            keys=jax.tree.map(lambda x: in_rows(x, size.cut_kv), bounds[1]),
            slopes=None if mask.slopes is None else mask.slopes.reshape(K, -1),
            heads=None if mask.dropout is None else mask.dropout.heads.reshape(K, -1),
            size=size,
            num_kv_heads=K,
        )

    def pad_queries(self, x_BKGt):
        """An array of queries with zeros for the padding."""
        return _pad(x_BKGt, 3, self.size.q)

    def pad_keys(self, x_BKs):
        """An array of keys with zeros for the padding."""
        return _pad(x_BKs, 2, self.size.kv)

    def each(self, begin, end, carry):
        """Go through the tiles that are seen, row by row; a row, a tile of queries, is a tile that has no keys yet.

        `begin(row, carry) -> (take, state)` says what to do in a row: `take(tile, state) -> state` for each of its
        tiles, beginning with `state`. Then `end(row, carry, state) -> carry`.
        """
        (B, n, _), m, size = self.queries.low.shape, self.keys.low.shape[1], self.size
        heads = np.int32(self.num_kv_heads // size.heads)
        groups = -(-m // GROUP)
        length = -(-m // groups)
        pieces = jax.tree.map(lambda x: x.reshape(B, -1), self.keys)  # in groups of whole tiles
        of_groups = pieces.joined(length * size.cut_kv)
        pieces = jax.tree.map(lambda x: in_rows(x, length * size.cut_kv), pieces)

        of_all = None
        if groups == 1:  # few enough for all at once
            of_rows = jax.vmap(lambda queries, keys: self._visits(queries, keys, np.int32(0), m), (0, None))
            of_all = jax.vmap(of_rows)(self.queries, jax.tree.map(lambda x: x[:, 0], pieces))

        def visit(b, i, visits: Visits, carry):
            """The tiles that all heads of a tile of queries visit of a group."""

            def head(number, carry):
                h = jnp.asarray(number, jnp.int32) * size.heads
                row = Tile(b, h, i * size.q, np.int32(0), size.heads, size.q, 0, False)
                take, state = begin(row, carry)
                full = lambda number, state: take(self._full(row, visits, number), state)  # noqa: E731
                part = lambda number, state: take(self._part(row, visits, number), state)  # noqa: E731
                state = lax.fori_loop(np.int32(0), visits.full.count, full, state)
                state = lax.fori_loop(np.int32(0), visits.parts.count, part, state)
                return end(row, carry, state)

            some = visits.full.count + visits.parts.count > 0
            return lax.fori_loop(np.int32(0), jnp.where(some, heads, np.int32(0)), head, carry)

        def row(number, carry):
            number = jnp.asarray(number, jnp.int32)
            b, i = number // n, number % n
            if groups == 1:
                return visit(b, i, jax.tree.map(lambda x: x[b, i], of_all), carry)
            queries = jax.tree.map(lambda x: x[b, i], self.queries)
            kinds = kinds_between(self.pair.mask, queries.joined(size.cut_q), jax.tree.map(lambda x: x[b], of_groups))
            seen = Worklist.of(kinds[0] != EMPTY)

            def group(number, carry):
                number = seen.items[number]
                keys, rest = jax.tree.map(lambda x: x[b, number], pieces), jnp.minimum(m - number * length, length)
                return visit(b, i, self._visits(queries, keys, number * length, rest), carry)

            return lax.fori_loop(np.int32(0), seen.count, group, carry)

        if B * n == 1:
            return row(np.int32(0), carry)
        return lax.fori_loop(np.int32(0), np.int32(B * n), row, carry)

    def _visits(self, queries: Bounds, keys: Bounds, start, number) -> Visits:
        """What the pieces of a query tile visit of those of a group of key tiles; the first `number` of these exist."""
        mask, size = self.pair.mask, self.size
        kinds = kinds_between(mask, queries.joined(size.cut_q), keys.joined(size.cut_kv))[0]
        kinds = jnp.where(jnp.arange(kinds.size, dtype=jnp.int32) < number, kinds, EMPTY)
        pieces = kinds_between(mask, queries, keys).reshape(size.cut_q, -1, size.cut_kv).swapaxes(0, 1)
        cut = (kinds == PARTIAL)[:, None, None] & (pieces != EMPTY)
        return Visits(jnp.int32(start), Worklist.of(kinds == FULL), Worklist.of(cut.reshape(-1)))

    def _full(self, row: Tile, visits: Visits, number) -> Tile:
        """The uncut tile that is visited at this turn."""
        j = visits.start + visits.full.items[number]
        return row._replace(kv=j * self.size.kv, kv_size=self.size.kv)

    def _part(self, row: Tile, visits: Visits, number) -> Tile:
        """The piece of a cut tile that is visited at this turn."""
        size, item, pieces = self.size, visits.parts.items[number], self.size.cut_q * self.size.cut_kv
        j, x, y = visits.start + item // pieces, item % pieces // size.cut_kv, item % size.cut_kv
        q_size, kv_size = size.q // size.cut_q, size.kv // size.cut_kv
        q, kv = row.q + x * q_size, j * size.kv + y * kv_size
        return row._replace(q=q, kv=kv, q_size=q_size, kv_size=kv_size, masked=True)

    def tokens(self, tile: Tile) -> tuple[Tokens, Tokens]:
        """The tile's queries, arrays [t], and keys, arrays [s]."""
        queries = jax.tree.map(lambda x: _read(x, (tile.b, tile.q), (1, tile.q_size))[0], self.pair.queries)
        keys = jax.tree.map(lambda x: _read(x, (tile.b, tile.kv), (1, tile.kv_size))[0], self.pair.keys)
        return queries, keys

    def of_heads(self, tile: Tile) -> tuple:
        """The tile's slopes [h,G], and global indices of its heads [h,G] and sequence; None for what is not used."""
        slopes, heads = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, tile.h, tile.heads), (self.slopes, self.heads)
        )
        dropout = self.pair.mask.dropout
        return slopes, heads, None if dropout is None else dropout.batch[tile.b]


def halve(length: int, blocks: BlockSizes) -> int:
    """How many of a shard's local keys are in the first of two parts: about half, a multiple of the tile's size."""
    size = _local_tile(length, blocks)
    return min(-(-length // (2 * size)) * size, length)


def _local_tile(length: int, blocks: BlockSizes) -> int:
    """Keys of a tile on the diagonal: as many in a pass that takes a shard by halves as in one that does not.

    Products of another shape are summed in another order. Where logits are large, the scores of a backward pass would
    then differ from those in the lse by enough to make dv several times as wrong (docs/accuracy.md).
    """
    return _tile_size(-(-length // 2), blocks.kv)


def _tile_size(tokens: int, wanted: int) -> int:
    """The size, about `wanted` at most, that cuts `tokens` into equal tiles with little padding (to 8)."""
    tiles = -(-tokens // wanted)
    size = -(-tokens // tiles)
    return size if tokens % size == 0 else -(-size // 8) * 8


def _pad(x, axis: int, size: int):
    amount = -x.shape[axis] % size
    return x if amount == 0 else jnp.pad(x, [(0, amount * (a == axis)) for a in range(x.ndim)])


def _read(x, starts, sizes):
    return lax.dynamic_slice(x, _starts(starts, x.ndim), (*sizes, *x.shape[len(starts) :]))


def _write(x, new, starts):
    return lax.dynamic_update_slice(x, new, _starts(starts, x.ndim))


def _starts(starts, ndim: int) -> list:
    """The start of a slice on each axis, 0 on those not named: all int32, which Python's 0 is not everywhere."""
    return [np.int32(start) if isinstance(start, int) else start for start in (*starts, *[0] * (ndim - len(starts)))]
