"""Which query sees which key: a function of their positions and segments alone, whatever the layout."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.mask_spec import MaskSpec

EMPTY, PARTIAL, FULL = 0, 1, 2
"""Kinds of tile: no query sees a key, some do, every query sees every key."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """Tokens that are evenly spaced in runs, one run after the other, as it is known when a program is traced.

    Attributes:
      lengths: tokens of each run.
      step: how far apart the tokens of a run are.
      starts: positions at which the runs begin, for each device that may hold the tokens.
    """

    lengths: tuple[int, ...]
    step: int
    starts: tuple[tuple[int, ...], ...]

    def follows(self, number: int) -> bool:
        """Whether a run begins where the one before it ends, on each device that may hold the tokens."""
        apart = self.step * self.lengths[number - 1]
        return number > 0 and all(starts[number - 1] + apart == starts[number] for starts in self.starts)

    def positions(self) -> np.ndarray | None:
        """int32 [t], if only one device may hold the tokens."""
        if len(self.starts) != 1:
            return None
        runs = zip(self.starts[0], self.lengths, strict=True)
        return np.concatenate([start + self.step * np.arange(length, dtype=np.int32) for start, length in runs])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The positions and segments of tokens.

    Attributes:
      positions: int32 [B or 1, t], natural positions in the sequence; of NumPy where they are constants, and None for a
        kernel's check of a pair, which asks for runs alone.
      segments: int32 [B or 1, t], or None where all tokens are of one segment.
      runs: the runs of evenly spaced tokens that these are; None where nobody says.
      real: bool [B or 1, t], False for tokens that only fill up a tile; None where all are real. No segment id could
        say so: every int32 may be a user's.
    """

    positions: Any
    segments: jax.Array | None = None
    runs: Runs | None = dataclasses.field(default=None, metadata={"static": True})
    real: Any = None

    def pad(self, amount: int) -> "Tokens":
        """These tokens and `amount` more, which nobody sees and which see nobody."""
        xp = np if isinstance(self.positions, np.ndarray) else jnp
        positions = xp.pad(self.positions, ((0, 0), (0, amount)), mode="edge")
        segments = None if self.segments is None else jnp.pad(self.segments, ((0, 0), (0, amount)), mode="edge")
        real = xp.arange(positions.shape[1], dtype=np.int32)[None] < self.positions.shape[1]
        return Tokens(positions, segments, real=real if amount else None)

    def of_batch(self, batch: int) -> "Tokens":
        """These tokens with arrays [batch, t]."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, x.shape[1])), self)

    def known(self) -> "Tokens":
        """These tokens with positions that are constants, if runs tell them; they may be for one sequence only."""
        positions = None if self.runs is None else self.runs.positions()
        return self if positions is None else dataclasses.replace(self, positions=positions[None])

    def tiles(self, size: int) -> "Tokens":
        """The tokens cut into tiles: arrays [..., t / size, size]."""
        return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], -1, size), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPair:
    """A block of queries and a block of keys, as a kernel must know them: where their tokens stand, and the mask.

    Attributes:
      queries: tokens of the resident shard.
      keys: tokens of the visiting shard.
      mask: how a query and a key make a weight.
      diagonal: whether queries and keys are of the same shard, so that the block lies on the diagonal of all scores;
        None where that is not known as the program is traced.
    """

    queries: Tokens
    keys: Tokens
    mask: MaskSpec
    diagonal: bool | None = dataclasses.field(default=None, metadata={"static": True})


def visible(mask: MaskSpec, queries: Tokens, keys: Tokens) -> jax.Array | None:
    """Bool: which query sees which key; None where the mask hides nothing. The arrays broadcast against each other."""
    conditions = []
    if mask.causal:
        conditions.append(queries.positions >= keys.positions)
    if mask.window is not None:
        conditions.append(queries.positions - keys.positions < mask.window)
        if not mask.causal:
            conditions.append(keys.positions - queries.positions < mask.window)
    if mask.min_distance:
        conditions.append(jnp.abs(queries.positions - keys.positions) >= mask.min_distance)
    if mask.seq_len is not None:
        conditions.append(jnp.maximum(queries.positions, keys.positions) < mask.seq_len)
    if mask.extra is not None:
        conditions.append(mask.extra.visible(queries.positions, keys.positions))
    if queries.segments is not None:
        conditions.append(queries.segments == keys.segments)
    conditions += [tokens.real for tokens in (queries, keys) if tokens.real is not None]
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


class Bounds(NamedTuple):
    """Between what the positions and the segments of each of n tiles lie, int32 [..., n]; no segments: None.

    `some` and `every` are bool [..., n]: whether any and whether all of a tile's tokens are real; None where all are.
    """

    low: jax.Array
    high: jax.Array
    first: jax.Array | None
    last: jax.Array | None
    some: jax.Array | None
    every: jax.Array | None

    @staticmethod
    def of(tokens: Tokens) -> "Bounds":
        """Those of tiles [..., n, size]."""
        positions, segments, real = tokens.positions, tokens.segments, tokens.real
        first, last = (None, None) if segments is None else (segments.min(-1), segments.max(-1))
        some, every = (None, None) if real is None else (real.any(-1), real.all(-1))
        return Bounds(positions.min(-1), positions.max(-1), first, last, some, every)

    def joined(self, size: int) -> "Bounds":
        """Those of tiles that each hold `size` of these, [..., n / size]; what is left over is with the last ones."""
        ways = (jnp.min, jnp.max, jnp.min, jnp.max, jnp.any, jnp.all)
        pairs = zip(ways, self, strict=True)
        return Bounds._make(None if x is None else way(in_rows(x, size), -1) for way, x in pairs)


def in_rows(x: jax.Array, size: int) -> jax.Array:
    """[..., n] as rows [..., n / size, size], the last of which is filled up with its last element."""
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, widths, mode="edge").reshape(*x.shape[:-1], -1, size)


def tile_kinds(pair: BlockPair) -> jax.Array:
    """int32 [..., n, m]: EMPTY, PARTIAL or FULL for each pair of n query tiles and m key tiles; `pair` holds tiles.

    It grows with the square of the length: for few queries, or few keys.
    """
    return kinds_between(pair.mask, Bounds.of(pair.queries), Bounds.of(pair.keys))


def _expanded(bounds: Bounds, axis: int) -> list[Any]:
    """The bounds with another axis, to compare them with others."""
    return [None if x is None else jnp.expand_dims(x, axis) for x in bounds]


def kinds_between(mask: MaskSpec, queries: Bounds, keys: Bounds) -> jax.Array:
    """int32 [..., n, m]: EMPTY, PARTIAL or FULL for each pair of n query tiles and m key tiles with these bounds.

    An EMPTY or FULL is proved by the bounds, while a PARTIAL may hide more than it seems.
    """
    q_low, q_high, q_first, q_last, q_some, q_every = _expanded(queries, -1)
    k_low, k_high, k_first, k_last, k_some, k_every = _expanded(keys, -2)
    nearest, farthest = q_low - k_high, q_high - k_low  # how far the queries stand behind the keys
    empty, full = jnp.zeros_like(nearest, bool), jnp.ones_like(nearest, bool)
    if mask.causal:
        empty, full = empty | (farthest < 0), full & (nearest >= 0)
    if mask.window is not None:
        empty, full = empty | (nearest >= mask.window), full & (farthest < mask.window)
        if not mask.causal:
            empty, full = empty | (-farthest >= mask.window), full & (-nearest < mask.window)
    if mask.min_distance:
        empty |= jnp.maximum(farthest, -nearest) < mask.min_distance
        full &= jnp.maximum(nearest, -farthest) >= mask.min_distance
    if mask.seq_len is not None:
        empty |= jnp.maximum(q_low, k_low) >= mask.seq_len
        full &= jnp.maximum(q_high, k_high) < mask.seq_len
    if mask.extra is not None:
        nothing, everything = mask.extra.bounds(q_low, q_high, k_low, k_high)
        empty, full = empty | nothing, full & everything
    if q_first is not None:
        empty |= (q_last < k_first) | (k_last < q_first)
        full &= (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    for some, every in ((q_some, q_every), (k_some, k_every)):
        if some is not None:
            empty |= ~some
            full &= every
    return jnp.where(empty, jnp.int32(EMPTY), jnp.where(full, jnp.int32(FULL), jnp.int32(PARTIAL)))
