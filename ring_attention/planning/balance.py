"""Count the pairs of a query and a key that each device of a ring computes at each hop."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ring_attention.attention.mask_spec import check_distance
from ring_attention.checks import require, require_shape
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
    layout: SequenceLayout,
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
      layout: of the sequence, for P devices.
      seq_len: T, tokens.
      causal: nobody sees later tokens.
      window: nobody sees tokens this far away or farther; None for no bound.
      segment_ids: integers [B, T] in the layout's order, or None; a token sees its own segment only.

    Returns:
      int64 [P, P], pairs summed over the batch (of one sequence, if there are no segments): device, then hop.

    Raises:
      ValueError: for a length that the layout cannot deal in equal shards, a window less than 1, segments of another
        shape or dtype.
    """
    require(seq_len > 0, f"seq_len={seq_len} must be positive; choose at least {layout.padded_length(1)}")
    layout.check_length(seq_len)
    check_distance("window", window)
    P, T = layout.ring_size, seq_len
    span = T if window is None else min(int(window), T)
    positions = layout.positions(T).astype(np.int64)
    first = T * _segment_numbers(segment_ids, T)  # a token is the number: T * its segment + its position
    lowest = first + np.maximum(positions - span + 1, 0)
    highest = first + (positions if causal else np.minimum(positions + span - 1, T - 1))
    keys, lowest, highest = (_sorted_shards(x, P) for x in (first + positions, lowest, highest))
    work, devices = np.zeros((P, P), np.int64), np.arange(P)
    for source in devices:
        # A query sees the keys up to its highest that do not stand before its lowest; sums need not pair the two.
        up_to = np.searchsorted(keys[source], highest.reshape(-1), side="right").reshape(P, -1)
        before = np.searchsorted(keys[source], lowest.reshape(-1), side="left").reshape(P, -1)
        work[devices, (devices - source) % P] = up_to.sum(1) - before.sum(1)
    return work


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


def _segment_numbers(segment_ids: np.ndarray | None, T: int) -> np.ndarray:
    """Number the segments: int64 [B or 1, T], small, not negative, and no number in two rows."""
    if segment_ids is None:
        return np.zeros((1, T), np.int64)
    segment_ids = np.asarray(segment_ids)
    require_shape("segment_ids", segment_ids.shape, (None, T), "BT")
    is_whole = np.issubdtype(segment_ids.dtype, np.integer)
    require(is_whole, f"segment_ids has dtype {segment_ids.dtype}, need integers; cast it")
    distinct, numbers = np.unique(segment_ids, return_inverse=True)
    rows = np.arange(len(segment_ids), dtype=np.int64)[:, None]
    return rows * len(distinct) + numbers.reshape(segment_ids.shape)


def _sorted_shards(x: np.ndarray, P: int) -> np.ndarray:
    """Sort each shard of an array [B, T]: [P, B*t] in ascending rows, for searches in them are fast."""
    return np.sort(x.reshape(len(x), P, -1).swapaxes(0, 1).reshape(P, -1), axis=1)
