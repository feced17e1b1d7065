"""Dealing packed documents: which chunks of a row each device holds, so that work is even and keys do not go far.

A row of T tokens is cut into P*n equal chunks, of which each of P devices holds n. Under a causal mask the work of a
chunk is the number of keys that its queries see, which follows from where its tokens stand in their documents; what has
to travel are the keys of chunks that others see. The table that says which chunk lies where is an array of the batch,
so that one compiled program serves every batch.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ring_attention.checks import is_number, is_whole, require, require_divisible, shown

BALANCE = 1.05
"""The most that a device's work may be, as a multiple of its share, before keys are rather sent farther."""
_LEAST_GAIN = 1e-6  # of a swap
_NEAR = 1.01  # what no way of dealing balances so well: the nearest one within this factor of the best


def deal_documents(
    lengths: Sequence[int] | np.ndarray, ring_size: int, chunks_per_shard: int, speeds: Sequence[float] | None = None
) -> np.ndarray:
    """Deal the chunks of a row of documents to the devices of a ring, by the work of each under a causal mask.

    A device's work is at most `BALANCE` times its share where any way of dealing found does that, and of those ways the
    one is taken that sends keys the fewest hops. Chunks begin in the order of the row and are swapped between devices
    as long as that makes the work more even without a key having to go too far; how far is allowed to grow until it
    does. The same arguments give the same table.

    Args:
      lengths: tokens of each document, in the order of the row. Their sum is divisible by the number of chunks.
      ring_size: P, devices of the ring.
      chunks_per_shard: n. More chunks balance better; kernels are at their best if a chunk is as long as a tile.
      speeds: of each device, in any unit; a device's share of the work is proportional to it. Equal by default.

    Returns:
      int32 [P, n]: the numbers of each device's chunks, ascending.

    Raises:
      ValueError: for lengths, sizes or speeds that are not positive, or do not fit each other.
    """
    P, n = ring_size, chunks_per_shard
    for name, size in (("ring_size", P), ("chunks_per_shard", n)):
        require(is_whole(size, 1), f"{name}={shown(size)} must be positive and whole; give at least 1")
    lengths = np.asarray(lengths)
    fits = lengths.ndim == 1 and lengths.dtype.kind in "iu" and lengths.size > 0 and lengths.min(initial=1) > 0
    require(fits, f"lengths={shown(lengths)} must be positive and whole; give the tokens of each document")
    require_divisible("the sum of lengths", int(lengths.sum()), "ring_size * chunks_per_shard", P * n, "pad the row")
    rates = np.ones(P) if speeds is None else np.array(require_speeds(speeds))
    require(len(rates) == P, f"speeds are {len(rates)}, need ring_size={P}; give one to each device of the ring")
    chunks = Chunks.of(lengths, P, n)
    share = chunks.work.sum() * rates / rates.sum()
    found = []
    for forth, back in chunks.ways(share):
        devices, most = _Search(chunks, share, forth, back).run()
        found.append((most, forth + back, devices))
        if most <= BALANCE:
            break
    enough = max(BALANCE, _NEAR * min(most for most, _, _ in found))
    devices = next(devices for most, _, devices in found if most <= enough)
    return np.argsort(devices, kind="stable").reshape(P, n).astype(np.int32)


def require_speeds(speeds: Sequence[float]) -> list[float]:
    """Return the speeds of a ring's devices; ValueError unless they are positive numbers."""
    require(
        len(speeds) > 0 and all(is_number(s) and 0 < s < math.inf for s in speeds),
        f"speeds={shown(list(speeds))} must be positive numbers; give one to each device of the ring",
    )
    return [float(speed) for speed in speeds]


def run_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """int64 [documents]: how many tokens in a row of a row's segment ids, [T], are alike."""
    starts = np.flatnonzero(np.diff(segment_ids, prepend=segment_ids[:1] - 1))
    return np.diff(np.append(starts, len(segment_ids)))


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The chunks of a row, in natural order.

    Attributes:
      ring_size: P, devices that they are dealt to.
      work: float64 [P*n], pairs of a query and a key that it sees, of each chunk's queries.
      first, last: int [P*n], the first and the last chunk that has a document in common with each.
      document: the work of the document that has the most.
    """

    ring_size: int
    work: np.ndarray
    first: np.ndarray
    last: np.ndarray
    document: float

    @staticmethod
    def of(lengths: np.ndarray, P: int, n: int) -> "Chunks":
        """The P*n chunks of a row of documents of these lengths."""
        ends = np.cumsum(lengths, dtype=np.int64)
        starts, chunk = ends - lengths, ends[-1] // (P * n)
        edges = np.arange(P * n + 1) * chunk
        pairs = lengths * (lengths + 1.0) / 2
        before = np.searchsorted(ends, edges, side="right")  # documents that end at or before each edge
        open_ = edges - np.append(starts, ends[-1])[before]
        work = np.diff(np.append(0, np.cumsum(pairs))[before] + open_ * (open_ + 1.0) / 2)
        last = np.searchsorted(ends, edges[1:] - 1, side="right")
        return Chunks(P, work, starts[before[:-1]] // chunk, (ends[last] - 1) // chunk, float(pairs.max()))

    def hops(self, devices: np.ndarray) -> tuple[int, int]:
        """(hops forth, hops back), the fewest in all that bring keys everywhere they are seen."""
        P, needed = self.ring_size, np.zeros(self.ring_size, bool)
        for chunk, last in enumerate(self.last):
            needed[(devices[chunk + 1 : last + 1] - devices[chunk]) % P] = True
        shifts = np.append(0, np.flatnonzero(needed[1:]) + 1)
        gaps = np.diff(np.append(shifts, P))
        widest = int(gaps.argmax())
        return int(shifts[widest]), int(P - shifts[widest] - gaps[widest])

    def ways(self, share: np.ndarray) -> list[tuple[int, int]]:
        """The (hops forth, hops back) worth trying, the fewest in all first.

        A document lies on no more devices in a row than hops one way and one, so its work says how many it takes.
        """
        P, most = self.ring_size, np.cumsum(np.sort(share)[::-1]) * BALANCE
        spread = min(int(np.searchsorted(most, self.document)), P - 1)
        least, _ = self.hops(np.arange(len(self.work)) // (len(self.work) // P))
        hops, ways = max(least, spread), []
        while hops < P - 1:
            splits = {0, 1, 2, hops // 4, hops // 2}
            splits |= {hops - split for split in splits}
            ways += [(hops - back, back) for back in sorted(splits) if 0 <= back <= hops]
            hops += 1 + hops // 4
        return [way for way in ways if way[0] >= least and max(way) >= spread] + [(P - 1, 0)]


class _Search:
    """Chunks on devices, being swapped until each device's work is near its share, at most so many hops away.

    Keys of a chunk on device i are seen on device j only if j - i modulo P is at most `forth`, or at least P - `back`.
    """

    def __init__(self, chunks: Chunks, share: np.ndarray, forth: int, back: int):
        P, N = chunks.ring_size, len(chunks.work)
        self._chunks, self._share = chunks, share
        self._devices = np.arange(N) // (N // P)
        self._load = np.bincount(self._devices, chunks.work, P)
        shift = np.arange(P) - np.arange(P)[:, None]
        self._far = (shift % P > forth) & (shift % P < P - back)  # [from, to]
        held = np.append(np.zeros((1, P), int), np.cumsum(np.eye(P, dtype=int)[self._devices], 0), 0)
        numbers = np.arange(N)
        # [chunk, device]: chunks in the way of this one lying there
        self._hindrances = (held[:-1] - held[chunks.first]) @ self._far
        self._hindrances += (held[chunks.last + 1] - held[numbers + 1]) @ self._far.T

    def run(self) -> tuple[np.ndarray, float]:
        """(the device of each chunk, the most work of a device as a multiple of its share)."""
        for _ in range(len(self._devices)):
            if (self._load / self._share).max() <= BALANCE or not self._step():
                break
        return self._devices, float((self._load / self._share).max())

    def _step(self) -> bool:
        """Make the best swap of the device with the most work that has any; False where none has."""
        for device in np.argsort(-self._load / self._share, kind="stable"):
            own, gain = self._gains(device)
            best = int(gain.argmax())
            if gain.flat[best] > _LEAST_GAIN * self._load.sum():
                mine, other = int(own[best // gain.shape[1]]), best % gain.shape[1]
                self._put(mine, int(self._devices[other]))
                self._put(other, int(device))
                return True
        return False

    def _gains(self, device: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the chunks of a device, and by how much it lowers the sum of work^2 / share to swap each with any."""
        chunks, devices, load, share = self._chunks, self._devices, self._load, self._share
        own, numbers = np.flatnonzero(devices == device), np.arange(len(devices))
        moved = chunks.work[own, None] - chunks.work
        gain = moved * (2 * load[device] - moved) / share[device]
        gain -= moved * ((2 * load / share)[devices] + moved / share[devices])
        fits = (self._hindrances[own][:, devices] == 0) & (self._hindrances[:, device] == 0) & (devices != device)
        linked = (chunks.first[own, None] <= numbers) & (numbers <= chunks.last[own, None])
        later = own[:, None] < numbers  # after the swap the earlier of two is where the later one was
        fits &= ~(linked & np.where(later, self._far[devices, device], self._far[device, devices]))
        return own, np.where(fits, gain, 0)

    def _put(self, chunk: int, device: int) -> None:
        before, chunks = self._devices[chunk], self._chunks
        far = self._far.astype(int)
        self._hindrances[chunk + 1 : chunks.last[chunk] + 1] += far[device] - far[before]
        self._hindrances[chunks.first[chunk] : chunk] += far[:, device] - far[:, before]
        self._load[[before, device]] += [-chunks.work[chunk], chunks.work[chunk]]
        self._devices[chunk] = device
