"""Which query sees which key: a function of what is known of the two tokens alone, whatever the layout."""

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
      starts: positions at which the runs begin, for each device that may hold the tokens; () where they are data.
    """

    lengths: tuple[int, ...]
    step: int
    starts: tuple[tuple[int, ...], ...]

    def follows(self, number: int) -> bool:
        """Whether a run begins where the one before it ends, on each device that may hold the tokens."""
        apart = self.step * self.lengths[number - 1]
        known = number > 0 and bool(self.starts)
        return known and all(starts[number - 1] + apart == starts[number] for starts in self.starts)

    def positions(self) -> np.ndarray | None:
        """int32 [t], if only one device may hold the tokens."""
        if len(self.starts) != 1:
            return None
        runs = zip(self.starts[0], self.lengths, strict=True)
        return np.concatenate([start + self.step * np.arange(length, dtype=np.int32) for start, length in runs])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What masks and scores depend on, beside the tokens' vectors.

    Attributes:
      positions: int32 [B or 1, t], natural positions in the sequence; of NumPy where they are constants, and None for a
        kernel's check of a pair, which asks for runs alone.
      segments: int32 [B or 1, t], or None where all tokens are of one segment.
      runs: the runs of evenly spaced tokens that these are; None where nobody says.
      real: bool [B or 1, t], False for padding, which nobody sees and which sees nobody; None where all are real. No
        segment id could say so: every int32 may be a user's.
      low, high: int32 [B or 1, t], of queries: the interval of positions, from `low` to before `high`, that each sees
        beside what is causal, or instead of all where the mask is not causal; None where there are none.
      bias: float32 [B or 1, t], of keys: what is added to their scores; None for nothing.
    """

    positions: Any
    segments: jax.Array | None = None
    runs: Runs | None = dataclasses.field(default=None, metadata={"static": True})
    real: Any = None
    low: Any = None
    high: Any = None
    bias: Any = None

    def pad(self, amount: int) -> "Tokens":
        """These tokens and `amount` more, which nobody sees and which see nobody."""
        if not amount:
            return dataclasses.replace(self, runs=None)
        xp = np if isinstance(self.positions, np.ndarray) else jnp
        inside = xp.arange(self.positions.shape[1] + amount, dtype=np.int32)[None] < self.positions.shape[1]

        def longer(x):
            return (np if isinstance(x, np.ndarray) else jnp).pad(x, ((0, 0), (0, amount)), mode="edge")

        padded = jax.tree.map(longer, dataclasses.replace(self, runs=None))
        return dataclasses.replace(padded, real=inside if self.real is None else padded.real & inside)

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
    conditions = _band(mask, queries, keys)
    if queries.low is not None:
        inside = (queries.low <= keys.positions) & (keys.positions < queries.high)
        conditions = [_all(conditions) | inside] if mask.causal else [*conditions, inside]
    if mask.min_distance:
        conditions.append(jnp.abs(queries.positions - keys.positions) >= mask.min_distance)
    if mask.seq_len is not None:
        conditions.append(jnp.maximum(queries.positions, keys.positions) < mask.seq_len)
    if mask.extra is not None:
        conditions.append(mask.extra.visible(queries.positions, keys.positions))
    if queries.segments is not None:
        conditions.append(queries.segments == keys.segments)
    conditions += [tokens.real for tokens in (queries, keys) if tokens.real is not None]
    return _all(conditions) if conditions else None


def _band(mask: MaskSpec, queries: Tokens, keys: Tokens) -> list[jax.Array]:
    """What `causal` and `window` show, conditions that all must hold."""
    conditions = []
    if mask.causal:
        conditions.append(queries.positions >= keys.positions)
    if mask.behind is not None:
        conditions.append(queries.positions - keys.positions < mask.behind)
    if mask.ahead is not None and not mask.causal:
        conditions.append(keys.positions - queries.positions < mask.ahead)
    return conditions


def _all(conditions: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_and, conditions)


class Bounds(NamedTuple):
    """Between what the positions and the segments of each of n tiles lie, int32 [..., n]; no segments: None.

    `some` and `every` are bool [..., n]: whether any and whether all of a tile's tokens are real; None where all are.
    Where queries have intervals, each lies within `widest_low` to before `widest_high` unless it is empty, and holds
    the positions from `common_low` to before `common_high`.
    """

    low: jax.Array
    high: jax.Array
    first: jax.Array | None
    last: jax.Array | None
    some: jax.Array | None
    every: jax.Array | None
    widest_low: jax.Array | None
    widest_high: jax.Array | None
    common_low: jax.Array | None
    common_high: jax.Array | None

    @staticmethod
    def of(tokens: Tokens) -> "Bounds":
        """Those of tiles [..., n, size]."""
        positions, segments, real = tokens.positions, tokens.segments, tokens.real
        first, last = (None, None) if segments is None else (segments.min(-1), segments.max(-1))
        some, every = (None, None) if real is None else (real.any(-1), real.all(-1))
        intervals = (None,) * 4 if tokens.low is None else _interval_bounds(tokens.low, tokens.high)
        return Bounds(positions.min(-1), positions.max(-1), first, last, some, every, *intervals)

    def joined(self, size: int) -> "Bounds":
        """Those of tiles that each hold `size` of these, [..., n / size]; what is left over is with the last ones."""
        ways = (jnp.min, jnp.max, jnp.min, jnp.max, jnp.any, jnp.all, jnp.min, jnp.max, jnp.max, jnp.min)
        pairs = zip(ways, self, strict=True)
        return Bounds._make(None if x is None else way(in_rows(x, size), -1) for way, x in pairs)


def _interval_bounds(low, high) -> tuple[jax.Array, ...]:
    """(widest low and high, common low and high) of the intervals of tiles [..., n, size]; see `Bounds`."""
    some, limits = low < high, jnp.iinfo(jnp.int32)
    low, high = jnp.where(some, low, limits.max), jnp.where(some, high, limits.min)
    return low.min(-1), high.max(-1), low.max(-1), high.min(-1)


def in_rows(x: jax.Array, size: int) -> jax.Array:
    """[..., n] as rows [..., n / size, size], the last of which is filled up with its last element."""
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, widths, mode="edge").reshape(*x.shape[:-1], -1, size)


def tile_kinds(pair: BlockPair) -> jax.Array:
    """int32 [..., n, m]: EMPTY, PARTIAL or FULL for each pair of n query tiles and m key tiles; `pair` holds tiles.

    It grows with the square of the length: for few queries, or few keys.
    """
    return kinds_between(pair.mask, Bounds.of(pair.queries), Bounds.of(pair.keys))


def _expanded(bounds: Bounds, axis: int) -> Any:
    """The bounds with another axis, to compare them with others."""
    return Bounds._make(None if x is None else jnp.expand_dims(x, axis) for x in bounds)


def kinds_between(mask: MaskSpec, queries: Bounds, keys: Bounds) -> jax.Array:
    """int32 [..., n, m]: EMPTY, PARTIAL or FULL for each pair of n query tiles and m key tiles with these bounds.

    An EMPTY or FULL is proved by the bounds, while a PARTIAL may hide more than it seems.
    """
    q, k = _expanded(queries, -1), _expanded(keys, -2)
    empty, full = _kinds_by_band(mask, q, k)
    if q.widest_low is not None:
        nothing, everything = _kinds_by_intervals(mask, q, k)
        empty = empty & nothing if mask.causal else empty | nothing
        full = full | everything if mask.causal else full & everything
    if mask.min_distance:
        empty |= jnp.maximum(q.high - k.low, k.high - q.low) < mask.min_distance
        full &= jnp.maximum(q.low - k.high, k.low - q.high) >= mask.min_distance
    if mask.seq_len is not None:
        empty |= jnp.maximum(q.low, k.low) >= mask.seq_len
        full &= jnp.maximum(q.high, k.high) < mask.seq_len
    if mask.extra is not None:
        nothing, everything = mask.extra.bounds(q.low, q.high, k.low, k.high)
        empty, full = empty | nothing, full & everything
    if q.first is not None:
        empty |= (q.last < k.first) | (k.last < q.first)
        full &= (q.first == q.last) & (k.first == k.last) & (q.first == k.first)
    for side in (q, k):
        if side.some is not None:
            empty |= ~side.some
            full &= side.every
    return jnp.where(empty, jnp.int32(EMPTY), jnp.where(full, jnp.int32(FULL), jnp.int32(PARTIAL)))


def _kinds_by_band(mask: MaskSpec, q, k) -> tuple[jax.Array, jax.Array]:
    """Bool (empty, full) by what `causal` and `window` show."""
    nearest, farthest = q.low - k.high, q.high - k.low  # how far the queries stand behind the keys
    empty, full = jnp.zeros_like(nearest, bool), jnp.ones_like(nearest, bool)
    if mask.causal:
        empty, full = empty | (farthest < 0), full & (nearest >= 0)
    if mask.behind is not None:
        empty, full = empty | (nearest >= mask.behind), full & (farthest < mask.behind)
    if mask.ahead is not None and not mask.causal:
        empty, full = empty | (-farthest >= mask.ahead), full & (-nearest < mask.ahead)
    return empty, full


def _kinds_by_intervals(mask: MaskSpec, q, k) -> tuple[jax.Array, jax.Array]:
    """Bool (empty, full) by the intervals of queries, which need not hold what all of them see as it is causal."""
    start = k.low
    if mask.causal:
        start = jnp.maximum(start, q.low + 1)
        if mask.behind is not None:
            start = jnp.where(q.high - k.low < mask.behind, start, k.low)
    empty = (q.widest_high <= k.low) | (q.widest_low > k.high)
    return empty, (q.common_low <= start) & (k.high < q.common_high)
