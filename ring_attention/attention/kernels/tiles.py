"""How a hop is cut into tiles, which of them the mask leaves to compute, and where each stands in the ring's arrays.

Arrays of queries are [B,K,G,t,...], of keys [B,K,s,...], of a tile the same without B and with fewer heads and tokens.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.masks import EMPTY, FULL, PADDED_KEY, PADDED_QUERY, PARTIAL, Hop, Tokens, tile_kinds


class Area(NamedTuple):
    """A rectangle of scores: of sequence `b`, heads from `h` on, queries from `q` on, keys from `kv` on.

    How many there are of each is static, and so is whether the mask may hide some of the scores.
    """

    b: jax.Array
    h: jax.Array
    q: jax.Array
    kv: jax.Array
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

    def into_keys(self, x_BKs, new_hs):
        """The array with these keys replaced."""
        return _write(x_BKs, new_hs[None], (self.b, self.h, self.kv))

    def of_columns(self, x_BKDs):
        """[h,D,s] of an array whose last axis are keys."""
        return _read(x_BKDs, (self.b, self.h, 0, self.kv), (1, self.heads, x_BKDs.shape[2], self.kv_size))[0]

    def into_columns(self, x_BKDs, new_hDs):
        """The array with these keys replaced."""
        return _write(x_BKDs, new_hDs[None], (self.b, self.h, 0, self.kv))

    def of_tile(self, tile, axis: int, whole: "Area"):
        """The area's queries, which stand on `axis`, of a tile that holds those of `whole`."""
        if self.q_size == whole.q_size:
            return tile
        return lax.dynamic_slice_in_dim(tile, self.q - whole.q, self.q_size, axis)

    def into_tile(self, tile, new, axis: int, whole: "Area"):
        """The tile with the area's queries replaced."""
        if self.q_size == whole.q_size:
            return new
        return lax.dynamic_update_slice_in_dim(tile, new, self.q - whole.q, axis)


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
    count: jax.Array

    @staticmethod
    def of(wanted: jax.Array) -> "Worklist":
        """Numbers of those that are True in bool [...,n]."""
        numbers = jnp.arange(wanted.shape[-1], dtype=jnp.int32)
        return Worklist(jnp.sort(jnp.where(wanted, numbers, numbers.size)), wanted.sum(-1, dtype=jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of a hop, as a loop over query tiles visits them.

    There are lists of what to visit rather than a branch in the loop, because a branch copies what it passes through.

    Attributes:
      hop: with tokens [B,t] and [B,s], padded to whole tiles.
      visited: those of the B*n query tiles of all sequences that have anything to visit.
      full: key tiles that are visited whole and without a mask, for each query tile.
      parts: pieces of those that the mask cuts, numbered tile after tile, in a tile by query and then key.
      slopes: float32 [K,G] or None, ALiBi's.
      heads: int32 [K,G] or None, global indices of query heads, for dropout.
      size: of a tile.
      num_kv_heads: K.
    """

    hop: Hop
    visited: Worklist
    full: Worklist
    parts: Worklist
    slopes: jax.Array | None
    heads: jax.Array | None
    size: Sizes = dataclasses.field(metadata={"static": True})
    num_kv_heads: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(hop: Hop, q_BHtD: jax.Array, k_BKsD: jax.Array, blocks: BlockSizes) -> "Tiles":
        """Cut the meeting of these queries and keys."""
        (B, _, t, _), (_, K, s, _) = q_BHtD.shape, k_BKsD.shape
        q, kv = _tile_size(t, blocks.q), _tile_size(s, blocks.kv)
        size = Sizes(q, kv, math.gcd(blocks.cut, q), math.gcd(blocks.cut, kv), math.gcd(blocks.heads, K))
        queries, keys, rule = hop.queries, hop.keys, hop.rule
        if t % q or s % kv:  # segments on one side need segments on the other
            queries, keys = queries.pad(-t % q, PADDED_QUERY), keys.pad(-s % kv, PADDED_KEY)
        hop = Hop(queries.of_batch(B), keys.of_batch(B), rule)

        def kinds(cut_q, cut_kv):
            """[B,n,m,cut_q,cut_kv]."""
            tiles = Hop(hop.queries.tiles(q // cut_q), hop.keys.tiles(kv // cut_kv), rule)
            return rearrange(tile_kinds(tiles), "B (n x) (m y) -> B n m x y", x=cut_q, y=cut_kv)

        whole, pieces = kinds(1, 1)[..., 0, 0], kinds(size.cut_q, size.cut_kv)
        cut = (whole == PARTIAL)[..., None, None] & (pieces != EMPTY)
        full, parts = Worklist.of(whole == FULL), Worklist.of(rearrange(cut, "B n m x y -> B n (m x y)"))
        return Tiles(
            hop=hop,
            visited=Worklist.of((full.count + parts.count > 0).reshape(-1)),
            full=full,
            parts=parts,
            slopes=None if rule.slopes is None else rule.slopes.reshape(K, -1),
            heads=None if rule.dropout is None else rule.dropout.heads.reshape(K, -1),
            size=size,
            num_kv_heads=K,
        )

    def pad_queries(self, x_BKGt):
        """An array of queries with zeros for the padding."""
        return _pad(x_BKGt, 3, self.size.q)

    def pad_keys(self, x_BKs):
        """An array of keys with zeros for the padding."""
        return _pad(x_BKs, 2, self.size.kv)

    @property
    def number(self) -> jax.Array:
        """How many query tiles of all sequences and heads have anything to visit."""
        return self.visited.count * (self.num_kv_heads // self.size.heads)

    def area(self, number) -> Area:
        """The area of query tile `number` of those; it has no keys yet."""
        groups, n = self.num_kv_heads // self.size.heads, self.full.count.shape[1]
        item = self.visited.items[number // groups]
        b, tile, h, size = item // n, item % n, number % groups * self.size.heads, self.size
        return Area(b, h, tile * size.q, 0, size.heads, size.q, 0, False)

    def visit(self, tile: Area, take, carry):
        """`take(area, carry) -> carry` over the areas that are visible to a query tile."""
        size, here = self.size, (tile.b, tile.q // self.size.q)

        def whole(number, carry):
            return take(tile._replace(kv=self.full.items[*here, number] * size.kv, kv_size=size.kv), carry)

        def part(number, carry):
            item, pieces = self.parts.items[*here, number], size.cut_q * size.cut_kv
            j, x, y = item // pieces, item % pieces // size.cut_kv, item % size.cut_kv
            q_size, kv_size = size.q // size.cut_q, size.kv // size.cut_kv
            q, kv = tile.q + x * q_size, j * size.kv + y * kv_size
            return take(tile._replace(q=q, kv=kv, q_size=q_size, kv_size=kv_size, masked=True), carry)

        carry = lax.fori_loop(0, self.full.count[here], whole, carry)
        return lax.fori_loop(0, self.parts.count[here], part, carry)

    def tokens(self, area: Area) -> tuple[Tokens, Tokens]:
        """Where the area's queries [t] and keys [s] stand."""
        queries = jax.tree.map(lambda x: _read(x, (area.b, area.q), (1, area.q_size))[0], self.hop.queries)
        keys = jax.tree.map(lambda x: _read(x, (area.b, area.kv), (1, area.kv_size))[0], self.hop.keys)
        return queries, keys

    def of_heads(self, area: Area) -> tuple:
        """The area's slopes [h,G], and global indices of its heads [h,G] and sequence; None for what is not used."""
        slopes, heads = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, area.h, area.heads), (self.slopes, self.heads)
        )
        return slopes, heads, None if heads is None else self.hop.rule.dropout.batch[area.b]


def _tile_size(tokens: int, wanted: int) -> int:
    """The size, about `wanted` at most, that cuts `tokens` into equal tiles with little padding (to 8)."""
    tiles = -(-tokens // wanted)
    size = -(-tokens // tiles)
    return size if tokens % size == 0 else -(-size // 8) * 8


def _pad(x, axis: int, size: int):
    amount = -x.shape[axis] % size
    return x if amount == 0 else jnp.pad(x, [(0, amount * (a == axis)) for a in range(x.ndim)])


def _read(x, starts, sizes):
    rest = x.ndim - len(starts)
    return lax.dynamic_slice(x, (*starts, *[0] * rest), (*sizes, *x.shape[len(starts) :]))


def _write(x, new, starts):
    return lax.dynamic_update_slice(x, new, (*starts, *[0] * (x.ndim - len(starts))))
