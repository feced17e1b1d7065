"""Which part of every shard has to travel how far around the ring, and which way.

Without a bound on how far a token sees, every shard visits every device. With one (a window, or segments of bounded
length) most of them need not: the same program runs on every device, so a part of a shard travels as far as it is
needed *somewhere* in the ring, and no farther.
"""

import dataclasses
import itertools

import numpy as np

from ring_attention.parallel.layouts import SequenceLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """A part of every shard that travels together.

    Attributes:
      start, stop: tokens of the shard.
      direction: 1 from device i to i+1, -1 from device i to i-1.
      hops: how many times it is passed on.
    """

    start: int
    stop: int
    direction: int
    hops: int


def plan_routes(
    layout: SequenceLayout, shard_len: int, *, causal: bool, window: int | None, duplex: bool
) -> tuple[Route, ...]:
    """The routes with the fewest hops.

    Args:
      layout: of the sequence.
      shard_len: tokens of a shard.
      causal: whether nobody sees later tokens.
      window: nobody sees tokens this far away or farther; None for no bound.
      duplex: send the second half of each shard the other way round, where that makes no more hops, so that both
        directions of each link are used.
    """
    P = layout.ring_size
    cuts = _cuts(layout, shard_len, causal, window) | ({shard_len // 2} if duplex else set())
    cuts = sorted(cut for cut in cuts | {0, shard_len} if 0 <= cut <= shard_len)
    parts = []
    for start, stop in itertools.pairwise(cuts):
        shifts = _needed_shifts(layout, shard_len, start, stop, causal, window)
        prefer_back = duplex and start >= shard_len // 2
        parts.append((start, stop, _ways(shifts, P, prefer_back)))
    routes = []
    for (forth, back), same in itertools.groupby(parts, key=lambda part: part[2]):
        same = list(same)
        start, stop = same[0][0], same[-1][1]
        routes += [Route(start=start, stop=stop, direction=1, hops=forth)] if forth else []
        routes += [Route(start=start, stop=stop, direction=-1, hops=back)] if back else []
    return tuple(routes)


def token_hops(routes: tuple[Route, ...]) -> int:
    """Tokens that a device sends, each as often as it passes them on."""
    return sum((route.stop - route.start) * route.hops for route in routes)


def _cuts(layout: SequenceLayout, shard_len: int, causal: bool, window: int | None) -> set[int]:
    """Places in a shard at which the need for its tokens may change.

    Dealt shards are not cut: of their many chunks one or another is needed nearly everywhere.
    """
    if window is None or layout.kind in ("striped", "dealt", "given"):
        return set()
    chunk = shard_len // layout.chunks_per_shard
    rest = (window - 1) % chunk
    within = {0, chunk - rest} | (set() if causal else {rest})
    return {first + cut for first in range(0, shard_len, chunk) for cut in within}


def _needed_shifts(layout: SequenceLayout, shard_len: int, start: int, stop: int, causal: bool, window) -> list[int]:
    """Every s = 1 ... P-1 such that some device needs these tokens of the device s places before it."""
    P = layout.ring_size
    shifts = np.arange(1, P)
    if window is None or layout.kind == "given":
        return shifts.tolist()
    if layout.kind == "striped":  # the nearest tokens of shards s apart are so many stripes apart, less a token
        near = lambda stripes: (stripes - 1) * layout.stripe + 1 < window  # noqa: E731
        return shifts[near(shifts) | (near(P - shifts) & (not causal))].tolist()
    chunk = shard_len // layout.chunks_per_shard
    if stop - start > chunk:
        pieces = [(first, first + chunk) for first in range(start, stop, chunk)]
        return sorted({s for piece in pieces for s in _needed_shifts(layout, shard_len, *piece, causal, window)})
    firsts = np.stack([layout.chunk_starts(shard, shard_len) for shard in range(P)])  # [P, chunks of a shard]
    key_low = firsts[:, start // chunk] + start % chunk
    key_high = key_low + stop - start - 1
    source = (np.arange(P)[:, None] - shifts) % P  # [P devices, P-1 shifts]
    query_low, query_high = firsts[:, None, :], firsts[:, None, :] + chunk - 1
    key_low, key_high = key_low[source][..., None], key_high[source][..., None]
    sees = (query_high >= key_low) if causal else (key_low - query_high < window)
    sees &= query_low - key_high < window
    return shifts[sees.any((0, 2))].tolist()


def _ways(shifts: list[int], P: int, prefer_back: bool) -> tuple[int, int]:
    """(hops forth, hops back) that together bring a part to every one of `shifts`, the fewest possible."""
    ways = []
    for split in range(len(shifts) + 1):
        forth = shifts[split - 1] if split else 0
        back = P - shifts[split] if split < len(shifts) else 0
        ways.append((forth + back, forth if prefer_back else back, (forth, back)))
    return min(ways)[2]
