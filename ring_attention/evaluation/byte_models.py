"""What a model of adjacent bytes reaches on the same text: the references that a Transformer has to beat.

A number is the mean bits per byte, -log2 p(byte | the bytes before it): lower is better, 8 is what guessing reaches,
and a Transformer below the order-2 number has learned more than which letters follow each other. The references are
fitted on the training split (256 MiB of a larger one), more text than a short run sees, so they are not straw men.

Witten-Bell smoothing (Witten and Bell 1991, method C) mixes each order with the one below it, down to the uniform
distribution over 256 bytes:

    p_k(b | c) = (count(c b) + kinds(c) p_{k-1}(b | c without its first byte)) / (count(c) + kinds(c))

where kinds(c) is the number of different bytes seen after the context c of k bytes. There is no constant to tune, so
the reference cannot be weakened by a bad choice, and no byte ever gets probability zero. After a context that was never
seen the lower order speaks alone.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from ring_attention.checks import require

MAX_ORDER = 2  # order 3 would need 256**4 counts, 34 GB
BYTES_PER_CHUNK = 1 << 22  # counted at once; a count of order 2 takes 134 MB whatever the chunk


class ByteModel:
    """Counts of bytes after each context of 0, 1, ... `order` bytes, and the probabilities that follow."""

    def __init__(self, counts: list[np.ndarray]):
        """`counts[k]`, integers [256**k, 256]: how often each byte followed each context of k bytes."""
        self._counts = counts
        self._totals = [count.sum(axis=1) for count in counts]
        self._kinds = [np.count_nonzero(count, axis=1) for count in counts]

    @classmethod
    def fit(cls, documents: Iterable[bytes], order: int = MAX_ORDER) -> "ByteModel":
        """Count every byte of the documents after the bytes before it in the same document.

        One pass; order 2 takes 134 MB, and about 300 MB while it counts documents of up to 4 MB. Raises ValueError
        unless 0 <= order <= 2.
        """
        require(0 <= order <= MAX_ORDER, f"order={order} is not supported; choose 0, 1 or 2")
        counts = [np.zeros(256 ** (k + 1), np.int64) for k in range(order + 1)]
        for chunk in _chunks(documents):
            for k, count in enumerate(counts):
                count += np.bincount(np.concatenate([_codes(text, k) for text in chunk]), minlength=count.size)
        return cls([count.reshape(-1, 256) for count in counts])

    def distribution(self, context: bytes) -> np.ndarray:
        """Return float64 [256]: each byte's probability after `context`, of which the last `order` bytes matter."""
        p = np.full(256, 1 / 256)
        for k, count in enumerate(self._counts[: len(context) + 1]):
            row = int.from_bytes(context[len(context) - k :], "big")
            p = self._mix(k, row, count[row], p)
        return p

    def bits(self, context: bytes, predicted: bytes, *, order: int | None = None) -> np.ndarray:
        """Return float64 [len(predicted)]: -log2 of each predicted byte's probability after the bytes before it.

        `order` is at most the fitted one, which None means. Bytes with less than `order` bytes before them, in context
        and predicted together, are left to the lower orders.
        """
        order = len(self._counts) - 1 if order is None else order
        require(0 <= order < len(self._counts), f"order={order} was not fitted; choose one below {len(self._counts)}")
        text = np.frombuffer(context + predicted, np.uint8)
        p = np.full(text.size, 1 / 256)
        for k in range(min(order + 1, text.size)):
            codes = _codes(text, k)
            p[k:] = self._mix(k, codes // 256, self._counts[k].reshape(-1)[codes], p[k:])
        return -np.log2(p[len(context) :])

    def bits_per_byte(self, segments: Iterable[tuple[bytes, bytes]], *, order: int | None = None) -> float:
        """Return the mean bits over the predicted bytes of all (context, predicted) segments, each starting anew.

        Raises ValueError if there is no predicted byte.
        """
        bits = [self.bits(context, predicted, order=order) for context, predicted in segments]
        total_bytes = sum(len(b) for b in bits)
        require(total_bytes > 0, "there is no byte to predict; give held-out segments with text")
        return float(sum(b.sum() for b in bits) / total_bytes)

    def _mix(self, k: int, contexts, counts, lower):
        """Mix as Witten-Bell does: counts after contexts of k bytes with the `lower` order's probabilities."""
        totals, kinds = self._totals[k][contexts], self._kinds[k][contexts]
        seen = totals > 0
        return np.where(seen, (counts + kinds * lower) / np.where(seen, totals + kinds, 1), lower)


def _chunks(documents: Iterable[bytes]) -> Iterator[list[np.ndarray]]:
    """Gather documents, uint8, until they hold BYTES_PER_CHUNK: a count costs as much for few bytes as for many."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(np.frombuffer(document, np.uint8))
        size += len(document)
        if size >= BYTES_PER_CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _codes(text: np.ndarray, k: int) -> np.ndarray:
    """Return int32 [max(0, len(text) - k)]: each byte and the k before it, as one number in base 256."""
    codes = np.zeros(max(0, text.size - k), np.int32)
    for place in range(k + 1):
        codes = codes * 256 + text[place : place + codes.size]
    return codes
