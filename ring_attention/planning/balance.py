"""Count the pairs of a query and a key, or of their tiles, that each device of a ring computes at each hop."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ring_attention.attention.mask_spec import check_distance
from ring_attention.checks import require, require_divisible, require_shape
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.layouts import SequenceLayout


class Balance(NamedTuple):
    """The time that a ring computes, over the time if each device always had its fair share. 1 is the best.

    Attributes:
      total: if devices wait for each other only at the end: most work of a device over the mean.
      by_hop: if they wait for each other at every hop: sum over hops of the most work of a device, over the sum of the
        means. Never less than `total`.
    """

    total: float
    by_hop: float


def work_by_hop(
    layout: SequenceLayout | DealtRows,
    seq_len: int,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Count the pairs of a query and a key that see each other, as `context_attention` masks them, by device and hop.

    At hop s, device i has the keys of device (i - s) mod P: every block moves one place on at every hop, whether anyone
    sees it or not. (`plan_routes` leaves out hops that bring nothing to anyone; they are columns of zeros here.)

    Sorts and searches, so that time grows with P * B*T * log(B*T / P) and memory with B*T.

    Args:
      layout: of the sequence, for P devices; or of B rows, each dealt by its own table.
      seq_len: T, tokens.
      causal: nobody sees later tokens.
      window: nobody sees tokens this far away or farther; None for no bound.
      segment_ids: integers [B, T] in the layout's order, or None; a token sees its own segment only.

    Returns:
      int64 [P, P], pairs summed over the batch (of one sequence, if neither segments nor tables say how many): device,
      then hop.

    Raises:
      ValueError: for a length that the layout cannot deal in equal shards, a window less than 1, segments of another
        shape or dtype.
    """
    require(seq_len > 0, f"seq_len={seq_len} must be positive; choose at least {layout.padded_length(1)}")
    if isinstance(layout, SequenceLayout):
        layout.check_length(seq_len)
    check_distance("window", window)
    T = seq_len
    span = T if window is None else min(int(window), T)
    positions = np.atleast_2d(layout.positions(T)).astype(np.int64)
    segments = _segment_numbers(segment_ids, len(positions), T)
    first = T * segments  # a token is the number: T * its segment + its position
    lowest = first + np.maximum(positions - span + 1, 0)
    highest = first + (positions if causal else np.minimum(positions + span - 1, T - 1))
    return _seen_by_hop(first + positions, lowest, highest, layout.ring_size)


def tiles_by_hop(layout: SequenceLayout | DealtRows, rows: Sequence[np.ndarray], tile: int) -> np.ndarray:
    """Count the tiles of packed documents that hold a visible pair under a causal mask, by device and hop.

    A kernel computes whole tiles, so that short documents cost more than their pairs. Much faster than `work_by_hop`.

    Args:
      layout: of rows of T tokens, for P devices, whose runs of consecutive tokens are multiples of a tile.
      rows: for each of B rows, int [documents] >= 1, the tokens of each document, T in all.
      tile: tokens of a side of a tile, which divides T.

    Returns:
      int64 [P, P], tiles summed over the rows: device, then hop, as `work_by_hop` counts them.
    """
    T = int(np.sum(rows[0]))
    require_divisible("the tokens of a row", T, "the tile", tile, "choose a smaller tile")
    begins, numbers = tile * np.arange(T // tile), np.arange(T // tile)
    lowest = []
    for lengths in rows:
        starts = np.cumsum(lengths) - lengths
        lowest.append(starts[np.searchsorted(starts, begins, side="right") - 1] // tile)
    places = np.atleast_2d(layout.positions(T // tile)).astype(np.int64)
    places = np.broadcast_to(places, (len(rows), T // tile))
    apart = (T // tile) * np.arange(len(rows), dtype=np.int64)[:, None]  # a tile is a number that no other row has
    lowest = apart + np.take_along_axis(np.stack(lowest), places, 1)
    highest = apart + numbers[places]
    return _seen_by_hop(highest, lowest, highest, layout.ring_size)


def hops_needed(work: np.ndarray) -> tuple[int, int]:
    """Find the fewest hops forth and back after which every device has met all keys that its queries see.

    Of ways as short the one with the fewest hops back, as a ring that counts its hops chooses (`parallel.hops`).

    Args:
      work: [P, P], by device and hop forth; see `work_by_hop`.
    """
    P = len(work)
    needed = [0, *(np.flatnonzero(work[:, 1:].any(0)) + 1).tolist(), P]
    ways = [(forth, P - following) for forth, following in itertools.pairwise(needed)]
    return min(ways, key=lambda way: (sum(way), way[1]))


def balance_of(work: np.ndarray, speeds: Sequence[float] | None = None) -> Balance:
    """Measure how evenly a ring's work is shared.

    Args:
      work: [P, hops], of each device at each hop, in any unit; see `work_by_hop`.
      speeds: of the P devices, in any unit, where they differ: then times are compared, work / speed, and a device's
        fair share is in proportion to its speed.

    Raises:
      ValueError: if there is no work at all, or not one positive speed for each device.
    """
    require(np.ndim(work) == 2 and np.sum(work) > 0, "work must be [P, hops] and not all zero; see work_by_hop")
    speeds = np.ones(len(work)) if speeds is None else np.asarray(speeds, np.float64)
    require_shape("speeds", speeds.shape, (len(work),), "P")
    require(bool(np.all(np.isfinite(speeds) & (speeds > 0))), f"speeds={speeds.tolist()} must be positive numbers")
    fair = np.sum(work) / speeds.sum()
    times = work / speeds[:, None]
    return Balance(total=float(times.sum(1).max() / fair), by_hop=float(times.max(0).sum() / fair))


def _seen_by_hop(keys: np.ndarray, lowest: np.ndarray, highest: np.ndarray, P: int) -> np.ndarray:
    """Count the keys between the lowest and the highest that each query sees: int64 [P, P], by device and hop.

    All are int64 [B, T], numbers in layout order, of which no two keys have the same.
    """
    keys, lowest, highest = (_sorted_shards(x, P) for x in (keys, lowest, highest))
    work, devices = np.zeros((P, P), np.int64), np.arange(P)
    for source in devices:
        # A query sees the keys up to its highest that do not stand before its lowest; sums need not pair the two.
        up_to = np.searchsorted(keys[source], highest.reshape(-1), side="right").reshape(P, -1)
        before = np.searchsorted(keys[source], lowest.reshape(-1), side="left").reshape(P, -1)
        work[devices, (devices - source) % P] = up_to.sum(1) - before.sum(1)
    return work


def _segment_numbers(segment_ids: np.ndarray | None, rows: int, T: int) -> np.ndarray:
    """Number the segments: int64 [B or 1, T], small, not negative, and no number in two of the B rows."""
    if segment_ids is None:
        return np.repeat(np.arange(rows, dtype=np.int64)[:, None], T, 1)
    segment_ids = np.asarray(segment_ids)
    require_shape("segment_ids", segment_ids.shape, (None if rows == 1 else rows, T), "BT")
    is_whole = np.issubdtype(segment_ids.dtype, np.integer)
    require(is_whole, f"segment_ids has dtype {segment_ids.dtype}, need integers; cast it")
    distinct, numbers = np.unique(segment_ids, return_inverse=True)
    row = np.arange(len(segment_ids), dtype=np.int64)[:, None]
    return row * len(distinct) + numbers.reshape(segment_ids.shape)


def _sorted_shards(x: np.ndarray, P: int) -> np.ndarray:
    """Sort each shard of an array [B, T]: [P, B*t] in ascending rows, for searches in them are fast."""
    return np.sort(x.reshape(len(x), P, -1).swapaxes(0, 1).reshape(P, -1), axis=1)
