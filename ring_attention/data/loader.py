"""Batches for training and for evaluation, dealt to the shards of a ring."""

import functools
import itertools
import math
from collections.abc import Sequence

import grain
import numpy as np

from ring_attention.checks import ConfigError, require, require_divisible, require_field
from ring_attention.data.packing import Example, PackedRows, encode_document, segments
from ring_attention.data.sources import DocumentSource
from ring_attention.data.tokenizers import Tokenizer
from ring_attention.parallel.dealt_rows import DocumentDealing
from ring_attention.parallel.layouts import SequenceLayout

TABLE = "table"
"""Name of the array of a batch that says which chunks each shard holds, where rows are dealt by their documents."""

Batch = dict[str, np.ndarray]

# Evaluation sees the same rows whatever the run's seed is, so that runs of different seeds can be compared.
HELD_OUT_SEED = 0
# For each stream. Grain's default (16 threads, 500 documents) would hold gigabytes of long documents.
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


class TrainLoader:
    """An endless iterator of batches, or of one process's rows of them, from the training documents.

    A batch is a dict of int32 [rows, seq_len] arrays named tokens, targets, positions, segment_ids and loss_mask
    (`PackedRows` says what each holds), reordered along axis 1 from natural order to the layout's. A `DocumentDealing`
    deals each row by its own documents and adds what `DealtRows.table` holds, int32 [rows, P, n]. Documents are
    shuffled by `seed`, differently in each epoch, and dealt to `streams` that are packed side by side; rows are taken
    from the streams in turn, so that a long document does not fill many rows in a row. Of fewer documents than streams
    each has a stream of its own, or they would be packed several times side by side. Streams, rows and batches run on
    across epochs.

    `rows` are the numbers, ascending from 0 to batch_size - 1, of a batch's rows that are wanted; None wants all. The
    others may be other processes': the rows of all are the same whoever loads them. Documents of streams that give no
    wanted row are never read, so processes share the reading out where batch_size and streams have a common divisor.

    `train_on_end` makes the ends of documents targets that count; with `special_tokens`, special tokens that documents
    spell out become their ids.

    Raises ValueError for sizes that are not positive, rows that are not in a batch and lengths that cannot be dealt.
    """

    def __init__(
        self,
        documents: DocumentSource,
        tokenizer: Tokenizer,
        *,
        seed: int,
        streams: int,
        seq_len: int,
        batch_size: int,
        layout: SequenceLayout | DocumentDealing,
        rows: Sequence[int] | None = None,
        train_on_end: bool = True,
        special_tokens: bool = False,
    ):
        _require_sizes(layout, seq_len=seq_len, batch_size=batch_size, streams=streams)
        self._rows = range(batch_size) if rows is None else _require_rows(rows, batch_size)
        self._batch_size, self._layout = batch_size, layout
        self._corpus = {"documents": len(documents), "digest": documents.digest(), "seed": seed, "streams": streams}
        shuffled = grain.MapDataset.source(documents).shuffle(seed).repeat()
        settings = dict(seq_len=seq_len, train_on_end=train_on_end, special_tokens=special_tokens)
        streams = min(streams, len(documents))
        self._dealt = [_packed_rows(shuffled[stream::streams], tokenizer, **settings) for stream in range(streams)]
        self._next_row = 0  # counted over the whole run: row n comes from stream n % streams
        self._streams = self._open_streams(self._next_row)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        wanted = []
        for row in range(self._batch_size):
            stream = (self._next_row + row) % len(self._dealt)
            if stream in self._streams:
                example = next(self._streams[stream])
                wanted += [example] if row in self._rows else []
        self._next_row += self._batch_size
        return _deal(wanted, self._layout)

    def get_state(self) -> dict:
        """Return where the documents stand in the streams that this loader reads; it is small and fit for JSON."""
        streams = {str(stream): rows.get_state() for stream, rows in self._streams.items()}
        return {"corpus": dict(self._corpus), "next_row": self._next_row, "streams": streams}

    def set_state(self, state: dict) -> None:
        """Go where `get_state` was called: the batches that follow are the same, bit by bit.

        Costs reading a document for each stream that is needed. The batch size, rows, seq_len and layout may differ
        from those of the run that saved the state; the documents go on where they were. Other rows may need other
        streams: `merge_states` unites the states of the processes that read them.

        Raises ConfigError if the documents or their order are others, or a document changed that was being read, and
        ValueError if the state lacks a stream.
        """
        if state["corpus"] != self._corpus:
            raise ConfigError(
                f"the saved position is in {_describe(state['corpus'])}, but this run reads "
                f"{_describe(self._corpus)}; restore the data section of the config, or start afresh"
            )
        streams = self._open_streams(state["next_row"])
        missing = [stream for stream in streams if str(stream) not in state["streams"]]
        require(
            not missing,
            f"the saved position lacks the streams {missing}, which rows {list(self._rows)} of batch_size="
            f"{self._batch_size} need; merge the states of all processes",
        )
        for stream, rows in streams.items():
            rows.set_state(state["streams"][str(stream)])
        self._next_row, self._streams = state["next_row"], streams

    def _open_streams(self, first_row: int) -> dict[int, grain.DatasetIterator]:
        """Return, at their beginnings, the streams that give wanted rows to any batch from row `first_row` on.

        Batches begin at first_row, first_row + batch_size ...; modulo the streams, that is every g-th stream.
        """
        g = math.gcd(self._batch_size, len(self._dealt))
        remainders = {(first_row + row) % g for row in self._rows}
        return {stream: iter(rows) for stream, rows in enumerate(self._dealt) if stream % g in remainders}


def merge_states(states: Sequence[dict]) -> dict:
    """Unite what the loaders of a run's processes returned from `get_state` after the same batch.

    Raises ValueError if they are not of one run after the same batch.
    """
    merged = {"corpus": states[0]["corpus"], "next_row": states[0]["next_row"], "streams": {}}
    remedy = "save the positions of all processes of one run after the same step"
    for process, state in enumerate(states):
        for name in ("corpus", "next_row"):
            got, need = state[name], merged[name]
            require(got == need, f"process {process} has {name}={got}, but process 0 has {need}; {remedy}")
        for stream, got in state["streams"].items():
            need = merged["streams"].setdefault(stream, got)
            place = f"process {process} is at {got} in stream {stream}"
            require(got == need, f"{place}, but another that reads it is at {need}; {remedy}")
    return merged


def held_out_rows(
    documents: DocumentSource,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    num_sequences: int,
    special_tokens: bool = False,
) -> list[Example]:
    """Pack the fixed evaluation set: `num_sequences` rows in natural order, each document read at most once.

    Their order does not depend on the run's seed. The ends of documents do not count (loss_mask 0): they stand for no
    bytes, so bits per byte are those of the text alone, as the byte models that they are compared with have them.

    Raises ConfigError if the documents do not fill the rows.
    """
    shuffled = grain.MapDataset.source(documents).shuffle(HELD_OUT_SEED)
    settings = dict(seq_len=seq_len, train_on_end=False, special_tokens=special_tokens)
    rows = list(itertools.islice(_packed_rows(shuffled, tokenizer, **settings), num_sequences))
    require_field(
        len(rows) == num_sequences,
        "eval_sequences",
        num_sequences,
        f"the {len(documents)} held-out documents fill only {len(rows)} rows of seq_len={seq_len}",
        "raise data.holdout_fraction, give more text, or evaluate fewer or shorter sequences",
    )
    return rows


def deal_batches(rows: list[Example], *, batch_size: int, layout: SequenceLayout | DocumentDealing) -> list[Batch]:
    """Batch rows, with the fields and the order of TrainLoader's.

    Raises ValueError if `batch_size` does not divide their number or their length cannot be dealt.
    """
    _require_sizes(layout, seq_len=len(rows[0]["tokens"]), batch_size=batch_size)
    remedy = "every evaluation batch has the same shape, so choose a multiple"
    require_divisible("number of rows", len(rows), "batch_size", batch_size, remedy)
    return [_deal(rows[start : start + batch_size], layout) for start in range(0, len(rows), batch_size)]


def spell_rows(rows: list[Example], tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Spell rows in bytes, for references without tokens: (context, predicted) for each segment.

    `context` is the segment's first token, which the row shows but does not ask for (b"" if it is `document_start`);
    `predicted` are the targets that count (loss_mask 1), in order. Segments without such targets are left out.
    """
    pairs = [
        (tokenizer.token_bytes(segment["tokens"][:1]), tokenizer.token_bytes(_counted_targets(segment)))
        for row in rows
        for segment in segments(row)
    ]
    return [(context, predicted) for context, predicted in pairs if predicted]


def _packed_rows(
    documents: grain.MapDataset, tokenizer: Tokenizer, *, seq_len: int, train_on_end: bool, special_tokens: bool
) -> PackedRows:
    encode = functools.partial(encode_document, tokenizer=tokenizer, special_tokens=special_tokens)
    encoded = documents.map(encode).to_iter_dataset(READ_OPTIONS)
    return PackedRows(encoded, seq_len=seq_len, train_on_end=train_on_end)


def _deal(rows: list[Example], layout: SequenceLayout | DocumentDealing) -> Batch:
    """Stack rows and reorder them from natural to layout order: the one place that does."""
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    if isinstance(layout, SequenceLayout):
        return {name: layout.permute(values, axis=1) for name, values in batch.items()}
    dealt = layout.deal(batch["segment_ids"])
    return {name: dealt.permute(values) for name, values in batch.items()} | {TABLE: dealt.table}


def _counted_targets(segment: Example) -> np.ndarray:
    return segment["targets"][segment["loss_mask"] == 1]


def _require_rows(rows: Sequence[int], batch_size: int) -> list[int]:
    rows = [int(row) for row in rows]
    ascending = bool(rows) and all(a < b for a, b in zip([-1, *rows], [*rows, batch_size], strict=True))
    require(ascending, f"rows={rows} must be some of 0 to {batch_size - 1}, each once and ascending; correct them")
    return rows


def _require_sizes(layout: SequenceLayout | DocumentDealing, **sizes: int) -> None:
    for name, size in sizes.items():
        require(size > 0, f"{name}={size} must be positive; choose at least 1")
    layout.check_length(sizes["seq_len"])


def _describe(corpus: dict) -> str:
    documents = "{documents} training documents (digest {digest})".format(**corpus)
    return documents + " shuffled by data.seed={seed} into data.streams={streams}".format(**corpus)
