"""Dealing packed documents: which chunks of a row each device holds, so that work is even and keys do not go far.

A row of T tokens is cut into P*n equal chunks, of which each of P devices holds n. Under a causal mask the work of a
chunk is the number of keys that its queries see, which follows from where its tokens stand in their documents; what has
to travel are the keys of chunks that others see. The table that says which chunk lies where is an array of the batch,
so that one compiled program serves every batch.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from ring_attention.checks import is_number, is_whole, require, require_divisible, shown

BALANCE = 1.05
"""The most that a device's work may be, as a multiple of its share, before keys are rather sent farther."""
_LEAST_GAIN = 3e-6  # of a swap, as a share of all work


def deal_documents(
    lengths: Sequence[int] | np.ndarray, ring_size: int, chunks_per_shard: int, speeds: Sequence[float] | None = None
) -> np.ndarray:
    """Deal the chunks of a row of documents to the devices of a ring, by the work of each under a causal mask.

    Chunks begin in the order of the row and are swapped between devices as long as that makes the work more even
    without a key having to go too far; how far grows until no device's work is more than `BALANCE` times its share, or
    keys go everywhere and nothing is left to swap. The same arguments give the same table.

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
    search = _Search(chunks, share)
    for forth, back in chunks.ways(share):
        if search.run(forth, back):
            break
    return np.argsort(search.devices, kind="stable").reshape(P, n).astype(np.int32)


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

    def ways(self, share: np.ndarray) -> Iterator[tuple[int, int]]:
        """(hops forth, hops back) to try, each allowing all that the one before does, and more in the end than needed.

        A document lies on no more devices in a row than hops one way and one, so its work says how many it takes.
        """
        P, most = self.ring_size, np.cumsum(np.sort(share)[::-1]) * BALANCE
        contiguous = np.arange(len(self.work)) // (len(self.work) // P)
        reach = int((contiguous[self.last] - contiguous).max())
        forth, back = max(reach, int(np.searchsorted(most, self.document))), 0
        while forth + back < P - 1:
            yield forth, back
            if 2 * back < forth:
                back += 1 + back // 4
            else:
                forth += 1 + forth // 4
        yield P - 1, 0


class _Search:
    """Chunks on devices, swapped until the work of each is near its share, and no key is seen too far away.

    Attributes:
      devices: int [P*n], the device of each chunk; at first they lie in order.
    """

    def __init__(self, chunks: Chunks, share: np.ndarray):
        P, N = chunks.ring_size, len(chunks.work)
        self._chunks, self._share, self._numbers = chunks, share, np.arange(N)
        self.devices = self._numbers // (N // P)
        self._load = np.bincount(self.devices, chunks.work, P)

    def run(self, forth: int, back: int) -> bool:
        """Swap chunks while that makes work more even; True once it is even enough.

        Keys of a chunk on device i are seen on device j only where j - i modulo P is at most `forth`, or at least P -
        `back`, which must hold at the beginning.
        """
        P, chunks = len(self._share), self._chunks
        shift = (np.arange(P) - np.arange(P)[:, None]) % P
        self._far = ((shift > forth) & (shift < P - back)).astype(np.float32)  # [from, to]
        held = np.append(np.zeros((1, P)), np.cumsum(np.eye(P)[self.devices], 0), 0).astype(np.float32)
        before, after = held[:-1] - held[chunks.first], held[chunks.last + 1] - held[self._numbers + 1]
        self._hindrances = before @ self._far + after @ self._far.T  # [chunk, device]: chunks in its way to lie there
        swapped = True
        while swapped:
            swapped = False
            for device in np.argsort(-self._load / self._share, kind="stable"):
                if (self._load <= BALANCE * self._share).all():
                    return True
                swapped |= self._improve(device)
        return False

    def _improve(self, device: int) -> bool:
        """Make the swap with a device of less work that lowers the sum of work^2 / share most; False if there is none.

        Of all chunks of this device and all chunks that may lie on it.
        """
        chunks, share, load, far, hindrances = self._chunks, self._share, self._load, self._far, self._hindrances
        relative = load / share
        own = np.flatnonzero(self.devices == device)
        others = np.flatnonzero((hindrances[:, device] == 0) & (relative[self.devices] < relative[device]))
        if not others.size:
            return False
        there = self.devices[others]
        moved = chunks.work[own, None] - chunks.work[others]
        gain = moved * (2 * (relative[device] - relative[there]) - moved * (1 / share[device] + 1 / share[there]))
        linked = (chunks.first[own, None] <= others) & (others <= chunks.last[own, None])
        later = own[:, None] < others  # after the swap the earlier of two is where the later one was
        hindered = linked * np.where(later, far[there, device], far[device, there]) + hindrances[own][:, there]
        gain = np.where(hindered == 0, gain, 0)
        best = int(gain.argmax())
        if gain.flat[best] <= _LEAST_GAIN * load.sum():
            return False
        mine, other = best // others.size, best % others.size
        self._put(own[mine], there[other])
        self._put(others[other], device)
        return True

    def _put(self, chunk: int, device: int) -> None:
        before, chunks, far = self.devices[chunk], self._chunks, self._far
        self._hindrances[chunk + 1 : chunks.last[chunk] + 1] += far[device] - far[before]
        self._hindrances[chunks.first[chunk] : chunk] += far[:, device] - far[:, before]
        self._load[before] -= chunks.work[chunk]
        self._load[device] += chunks.work[chunk]
        self.devices[chunk] = device
