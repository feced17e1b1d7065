"""A block pair as a few tiles whose places are known when the program is traced, for kernels that know few masks.

Which queries see which keys depends on the devices that their shards belong to, and so on numbers that only the running
program knows. But there are few kinds of pairs: in a zigzag ring two beside the local one, whatever its size. Each is
planned while the program is traced, and the device picks the plan that holds when it runs.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Runs
from ring_attention.checks import require

FULL, CAUSAL, OTHER = "full", "causal", "other"
"""Masks of a tile: every query sees every key; query number a sees the keys up to number a, of those less than
`window` back where there is one; anything else."""

MOST_TILES = 256
"""Each is a call in the program; more are refused rather than compiled."""


class StaticTile(NamedTuple):
    """`rows` queries from number `q` on and `columns` keys from `kv` on, counted in the order of the pair's arrays.

    Not a `tiling.Tile`: these numbers are Python's, for static slices, and cover all sequences and heads of a call.
    """

    q: int
    rows: int
    kv: int
    columns: int
    kind: str
    window: int | None = None

    def shares_queries(self, other: "StaticTile") -> bool:
        """Whether some queries are in both."""
        return self.q < other.q + other.rows and other.q < self.q + self.rows

    def of_queries(self, x, axis: int = 2):
        """The tile's queries of an array [B,H,t,...]."""
        return lax.slice_in_dim(x, self.q, self.q + self.rows, axis=axis)

    def of_keys(self, x, axis: int = 2):
        """The tile's keys of an array [B,K,s,...]."""
        return lax.slice_in_dim(x, self.kv, self.kv + self.columns, axis=axis)

    # Not by `at`: of a whole shard it passes an empty index, at which jaxlib 0.11.2 ends in a segmentation fault.
    def into_queries(self, x, new):
        """The array [B,H,t,...] with these queries replaced."""
        return lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), self.q, 2)

    def added_to_queries(self, x, more):
        """The array [B,H,t,...] with something added to these queries."""
        return self.into_queries(x, self.of_queries(x) + more.astype(x.dtype))

    def added_to_keys(self, x, more):
        """The array [B,K,s,...] with something added to these keys."""
        return lax.dynamic_update_slice_in_dim(x, self.of_keys(x) + more.astype(x.dtype), self.kv, 2)


class _Spans(NamedTuple):
    """Runs of tokens by numbers: lengths, where each begins in the arrays, and positions [devices, runs]."""

    lengths: list[int]
    offsets: list[int]
    starts: np.ndarray

    @staticmethod
    def of(runs: Runs) -> "_Spans":
        return _Spans(
            list(runs.lengths), [0, *itertools.accumulate(runs.lengths)][:-1], np.array(runs.starts, np.int32)
        )


def plan(pair: BlockPair) -> tuple[list[list[StaticTile]], jax.Array | None]:
    """(plans, number): the ways in which queries and keys may meet here, and which of them holds; None if only one may.

    The tiles of a plan are disjoint, and every score outside of them is hidden. Raises as `plans_of`.
    """
    plans, bands = plans_of(pair)
    if len(plans) == 1:
        return plans, None
    q_runs, kv_runs = pair.queries.runs, pair.keys.runs
    assert q_runs is not None  # others were refused
    assert kv_runs is not None
    q, kv = _Spans.of(q_runs), _Spans.of(kv_runs)
    q_starts, kv_starts = (x.positions[0, np.array(y.offsets)] for x, y in ((pair.queries, q), (pair.keys, kv)))
    here = _bands(pair.mask, q_starts, kv_starts, q, kv, q_runs.step)
    return plans, jnp.argmax((bands == here).all((1, 2, 3)))


def plans_of(pair: BlockPair) -> tuple[list[list[StaticTile]], np.ndarray]:
    """(plans, bands of each, see `_bands`): all ways in which queries and keys may meet, by their runs and the mask.

    Raises:
      ValueError: where nobody says how the tokens are spaced, or for more than MOST_TILES tiles.
    """
    queries, keys, mask = pair.queries, pair.keys, pair.mask
    require(mask.min_distance == 0, 'this kernel cannot leave out the keys that are near; use impl="xla"')
    q_runs, kv_runs = queries.runs, keys.runs
    known = all(x is not None and x.starts for x in (q_runs, kv_runs))
    require(
        known and q_runs is not None and kv_runs is not None and q_runs.step == kv_runs.step,
        "this kernel needs queries and keys that are evenly spaced in a few runs, and here nobody says that they are; "
        'use impl="xla"',
    )
    assert q_runs is not None
    assert kv_runs is not None
    q, kv, step = _Spans.of(q_runs), _Spans.of(kv_runs), q_runs.step
    i, j = np.indices((len(q.starts), len(kv.starts))).reshape(2, -1)
    if pair.diagonal is not None:
        i, j = (x[(i == j) == pair.diagonal] for x in (i, j))
    bands = np.unique(_bands(mask, q.starts[i], kv.starts[j], q, kv, step), axis=0)
    plans = [_tiles(mask, block, q, kv) for block in bands]
    number = sum(map(len, plans))
    require(
        number <= MOST_TILES,
        f"this kernel would need {number} calls for the ways in which shards of this layout can meet, at most "
        f'{MOST_TILES} are allowed; use strategy="ring" with layout="zigzag", or impl="xla"',
    )
    return plans, bands


def _bands(mask: MaskSpec, q_starts, kv_starts, q: _Spans, kv: _Spans, step: int):
    """[..., queries' runs, keys' runs, 2]: the least and the most number by which a query may lead a key that it sees.

    Query number a of a run sees key number b of another where least <= a - b <= most. Both are cut to what can occur,
    so that two pairs with the same mask have the same numbers.
    """
    xp = jnp if isinstance(q_starts, jax.Array) else np
    ahead = q_starts[..., :, None] - kv_starts[..., None, :]
    lengths, others = xp.array(q.lengths)[:, None], xp.array(kv.lengths)[None, :]
    least, most = xp.broadcast_to(1 - others, ahead.shape), xp.broadcast_to(lengths - 1, ahead.shape)
    if mask.causal:
        least = -(ahead // step)
    if mask.behind is not None:
        most = (mask.behind - 1 - ahead) // step
    if mask.ahead is not None and not mask.causal:
        least = -((mask.ahead - 1 + ahead) // step)
    bands = [xp.clip(least, 1 - others, lengths), xp.clip(most, -others, lengths - 1)]
    hidden = bands[0] > bands[1]  # one way of writing it
    return xp.stack([xp.where(hidden, lengths, bands[0]), xp.where(hidden, -others, bands[1])], -1)


def _tiles(mask: MaskSpec, bands: np.ndarray, q: _Spans, kv: _Spans) -> list[StaticTile]:
    """The plan for one kind of block pair."""
    if mask.intervals or (mask.seq_len is not None and not mask.causal):  # by causal, no real query sees padding
        return [StaticTile(0, sum(q.lengths), 0, sum(kv.lengths), OTHER)]
    lowest, highest = 1 - np.array(kv.lengths)[None, :], np.array(q.lengths)[:, None] - 1
    full = (bands[..., 0] == lowest) & (bands[..., 1] == highest)
    hidden = bands[..., 0] > bands[..., 1]
    diagonal = (bands[..., 0] == 0) & (bands[..., 1] == highest)
    if q.lengths == kv.lengths:
        earlier, same = np.tri(len(q.lengths), k=-1, dtype=bool), np.eye(len(q.lengths), dtype=bool)
        if (full == earlier).all() and (diagonal[same]).all() and hidden[~(earlier | same)].all():
            return [StaticTile(0, sum(q.lengths), 0, sum(kv.lengths), CAUSAL)]
    found = []
    for row, runs in itertools.groupby(range(len(q.lengths)), key=lambda i: full[i].tolist()):
        runs = list(runs)
        top, bottom = q.offsets[runs[0]], q.offsets[runs[-1]] + q.lengths[runs[-1]]
        for is_full, columns in itertools.groupby(range(len(row)), key=row.__getitem__):
            columns = list(columns)
            if is_full:
                left, right = kv.offsets[columns[0]], kv.offsets[columns[-1]] + kv.lengths[columns[-1]]
                found.append(StaticTile(top, bottom - top, left, right - left, FULL))
    for i, j in zip(*np.nonzero(~full & ~hidden), strict=True):
        least, most = bands[i, j].tolist()
        found += _cut(least, most, q.offsets[i], q.lengths[i], kv.offsets[j], kv.lengths[j])
    return found


def _cut(least: int, most: int, q: int, length: int, kv: int, others: int) -> list[StaticTile]:
    """The tiles of two runs whose scores the mask cuts."""
    size = min(length - least, others)
    first, last, window = q + least, q + least + size, most - least + 1  # queries before the first see nothing
    after = q + length - last  # queries that would see all keys, were there no window
    if least < 0 or (after and most < length - 1):
        return [StaticTile(q, length, kv, others, OTHER)]
    causal = StaticTile(first, size, kv, size, CAUSAL, window if window < size else None)
    return [causal, StaticTile(last, after, kv, others, FULL)] if after else [causal]
