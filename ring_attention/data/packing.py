"""Documents of any length to rows of one length: nothing padded, nothing lost, nothing seen twice.

The tokens of all documents, each opened by `document_start`, form one stream that is cut every `seq_len` tokens. A
row's targets are the next tokens of its tokens' own documents, so its last target may be the token that opens the next
row: every token of a text is a target exactly once. So is `document_end`, after the last token of each document, and a
model learns to stop; it is a target only and stands in no row. A document that continues in the next row does not end
there: it is segment 1 in that row and goes on counting its positions.

Grain's own ConcatThenSplitIterDataset restarts positions in every row and cuts without that overlap of one token, so
that the first token of a row would never be learned; hence this module.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from ring_attention.checks import ConfigError, require
from ring_attention.data.sources import Document
from ring_attention.data.tokenizers import Tokenizer

Example = dict[str, np.ndarray]
FIELDS = ("tokens", "targets", "positions", "segment_ids", "loss_mask")
"""Names of the arrays of an Example, and of a batch."""


@dataclasses.dataclass(frozen=True)
class EncodedDocument:
    """A document's name, its tokens after `document_start` as int32 [tokens + 1], and the id that ends it."""

    name: str
    tokens: np.ndarray
    end: int


def encode_document(document: Document, tokenizer: Tokenizer, *, special_tokens: bool) -> EncodedDocument:
    """Encode a document's text, opened by `document_start`; `special_tokens` as `Tokenizer.encode` takes it."""
    start = np.array([tokenizer.document_start], np.int32)
    tokens = tokenizer.encode(document.text, special_tokens=special_tokens)
    return EncodedDocument(document.name, np.concatenate([start, tokens]), tokenizer.document_end)


NO_DOCUMENT = EncodedDocument("", np.empty(0, np.int32), 0)


class PackedRows(grain.IterDataset):
    """Rows of `seq_len` tokens from a dataset of encoded documents (see `encode_document`).

    An element is a dict of int32 [seq_len] arrays in natural order:
      tokens       the row.
      targets      the token after each; at a document's end `document_end`.
      positions    within the document, from 0 at `document_start`, continued from row to row.
      segment_ids  1, 2, 3 ... within the row.
      loss_mask    1; at a document's end 0 unless `train_on_end`.

    If the documents end, the row that they leave incomplete is dropped. An iterator's state is the state of the
    documents' iterator before the current document, an offset into it and its length, whatever the length of the rows,
    so restoring reads one document. Going on in a document of another length raises ConfigError.
    """

    def __init__(self, documents: grain.IterDataset, *, seq_len: int, train_on_end: bool = True):
        require(seq_len > 0, f"seq_len={seq_len} must be positive; choose at least 1")
        super().__init__(documents)
        self._documents, self._seq_len, self._train_on_end = documents, seq_len, train_on_end

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedRowsIterator(iter(self._documents), self._seq_len, self._train_on_end)


class _PackedRowsIterator(grain.DatasetIterator):
    def __init__(self, documents: grain.DatasetIterator, seq_len: int, train_on_end: bool):
        super().__init__(documents)
        self._documents, self._seq_len, self._train_on_end = documents, seq_len, train_on_end
        self._open(NO_DOCUMENT)

    def __next__(self) -> Example:
        pieces, room = [], self._seq_len
        while room:
            if self._at_end:
                self._open_next()
            end = min(self._offset + room, len(self._document.tokens))
            pieces.append((self._document, self._offset, end))
            room -= end - self._offset
            self._offset = end
        return _example(pieces, self._train_on_end)

    def get_state(self) -> dict:
        if self._at_end:
            return {"documents": self._documents.get_state(), "offset": 0, "length": 0}
        length = len(self._document.tokens)
        return {"documents": self._state_before_document, "offset": self._offset, "length": length}

    def set_state(self, state: dict) -> None:
        self._documents.set_state(state["documents"])
        self._open(NO_DOCUMENT)
        if state["length"]:
            self._open_next()
            self._go_to(state["offset"], state["length"])

    @property
    def _at_end(self) -> bool:
        return self._offset == len(self._document.tokens)

    def _open(self, document: EncodedDocument) -> None:
        self._document, self._offset = document, 0

    def _open_next(self) -> None:
        self._state_before_document = self._documents.get_state()
        self._open(next(self._documents))

    def _go_to(self, offset: int, length: int) -> None:
        """Go on at `offset` of the open document, which had `length` tokens; what changed since would be garbage."""
        tokens_now = len(self._document.tokens)
        if not 0 <= offset < length == tokens_now:
            raise ConfigError(
                f"the saved position is token {offset} of the {length} in document {self._document.name!r}, which has "
                f"{tokens_now} now; restore the document as it was, or start afresh"
            )
        self._offset = offset


def _example(pieces: list[tuple[EncodedDocument, int, int]], train_on_end: bool) -> Example:
    """Make a row of `pieces`, (document, begin, end) each; a piece becomes a segment."""
    ends_document = [end == len(document.tokens) for document, _, end in pieces]
    lengths = [end - begin for _, begin, end in pieces]
    loss_mask = np.ones(sum(lengths), np.int32)
    loss_mask[np.cumsum(lengths)[ends_document] - 1] = train_on_end
    return {
        "tokens": np.concatenate([document.tokens[begin:end] for document, begin, end in pieces]),
        "targets": np.concatenate([_following(document, begin, end) for document, begin, end in pieces]),
        "positions": np.concatenate([np.arange(begin, end, dtype=np.int32) for _, begin, end in pieces]),
        "segment_ids": np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), lengths),
        "loss_mask": loss_mask,
    }


def _following(document: EncodedDocument, begin: int, end: int) -> np.ndarray:
    """Return the token after each of the document's tokens[begin:end]; after its last, the one that ends it."""
    following = document.tokens[begin + 1 : end + 1]
    return following if end < len(document.tokens) else np.append(following, np.int32(document.end))


def segments(row: Example) -> Iterator[Example]:
    """Yield the row's segments in order, each the same fields cut to the segment."""
    cuts = np.flatnonzero(np.diff(row["segment_ids"])) + 1
    pieces = {name: np.split(values, cuts) for name, values in row.items()}
    for index in range(len(cuts) + 1):
        yield {name: values[index] for name, values in pieces.items()}
