"""Batches for training and for evaluation, dealt to the shards of a ring."""

import functools
import itertools

import grain
import numpy as np

from ring_attention.checks import require, require_divisible, require_field
from ring_attention.data.config import DataConfig
from ring_attention.data.packing import Example, PackedRows, encode_document, segments
from ring_attention.data.sources import open_documents, split_documents
from ring_attention.data.tokenizers import Tokenizer
from ring_attention.parallel.layouts import SequenceLayout

Batch = dict[str, np.ndarray]

# Evaluation sees the same rows whatever data.seed is, so that runs with different seeds can be compared.
HELD_OUT_SEED = 0
# Grain's default (16 threads, 500 documents) would hold gigabytes of long documents.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


class TrainLoader:
    """An endless iterator of batches from the training documents.

    A batch is a dict of int32 [batch_size, seq_len] arrays named tokens, targets, positions, segment_ids and loss_mask
    (`PackedRows` says what each holds), reordered along axis 1 from natural order to the layout's. Documents are
    shuffled by `config.seed`, differently in each epoch; rows and batches run on across epochs.

    Raises ConfigError for documents that cannot be used, and ValueError for lengths that cannot be dealt, before any
    file is opened.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, *, seq_len: int, batch_size: int, layout: SequenceLayout
    ):
        _require_sizes(layout, seq_len=seq_len, batch_size=batch_size)
        train, _ = split_documents(open_documents(config), config.holdout_fraction)
        self._corpus = {"documents": len(train), "digest": train.digest(), "seed": config.seed}
        documents = grain.MapDataset.source(train).shuffle(config.seed).repeat()
        rows = _packed_rows(documents, tokenizer, seq_len)
        self._batches = iter(rows.batch(batch_size, batch_fn=functools.partial(_deal, layout=layout)))

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict:
        """Return where the stream of documents stands: a few numbers and strings, fit for JSON."""
        return {"corpus": dict(self._corpus), "position": self._batches.get_state()}

    def set_state(self, state: dict) -> None:
        """Go where `get_state` was called: the batches that follow are the same, bit by bit.

        Costs reading one document. The batch size, seq_len and layout may differ from those of the run that saved the
        state; the documents go on where they were. Raises ValueError if the documents or their order are others.
        """
        require(
            state["corpus"] == self._corpus,
            f"the saved position is in {_describe(state['corpus'])}, but this run reads {_describe(self._corpus)}; "
            "restore data.paths, data.holdout_fraction and data.seed, or start afresh",
        )
        self._batches.set_state(state["position"])


def held_out_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    num_sequences: int,
    layout: SequenceLayout,
) -> list[Batch]:
    """Build the fixed evaluation set: `num_sequences` rows as batches, with the fields and the order of TrainLoader's.

    The rows come from the held-out documents, each read at most once, in an order that does not depend on
    `config.seed`. Raises ConfigError if these documents do not fill the rows, and ValueError if `batch_size` does not
    divide `num_sequences` or the length cannot be dealt.
    """
    _require_sizes(layout, seq_len=seq_len, batch_size=batch_size, num_sequences=num_sequences)
    remedy = "every evaluation batch has the same shape, so choose a multiple"
    require_divisible("num_sequences", num_sequences, "batch_size", batch_size, remedy)
    rows = _held_out_rows(config, tokenizer, seq_len, num_sequences)
    return [_deal(rows[start : start + batch_size], layout) for start in range(0, num_sequences, batch_size)]


def held_out_segments(
    config: DataConfig, tokenizer: Tokenizer, *, seq_len: int, num_sequences: int
) -> list[tuple[bytes, bytes]]:
    """Spell the rows of `held_out_batches` in bytes, for references without tokens: (context, predicted) per segment.

    `context` is the segment's first token, which the row shows but does not ask for (b"" if it is `document_start`);
    `predicted` are the targets that count (loss_mask 1), in order. Segments without such targets are left out.
    """
    rows = _held_out_rows(config, tokenizer, seq_len, num_sequences)
    pairs = [
        (tokenizer.token_bytes(segment["tokens"][:1]), tokenizer.token_bytes(_counted_targets(segment)))
        for row in rows
        for segment in segments(row)
    ]
    return [(context, predicted) for context, predicted in pairs if predicted]


def _held_out_rows(config: DataConfig, tokenizer: Tokenizer, seq_len: int, num_sequences: int) -> list[Example]:
    """Pack the evaluation set's rows, in natural order."""
    _, held_out = split_documents(open_documents(config), config.holdout_fraction)
    documents = grain.MapDataset.source(held_out).shuffle(HELD_OUT_SEED)
    rows = list(itertools.islice(_packed_rows(documents, tokenizer, seq_len), num_sequences))
    require_field(
        len(rows) == num_sequences,
        "data.holdout_fraction",
        config.holdout_fraction,
        f"the {len(held_out)} held-out documents fill {len(rows)} rows of seq_len={seq_len}, need {num_sequences}",
        "raise it, give more text, or evaluate fewer or shorter sequences",
    )
    return rows


def _packed_rows(documents: grain.MapDataset, tokenizer: Tokenizer, seq_len: int) -> PackedRows:
    encoded = documents.map(functools.partial(encode_document, tokenizer=tokenizer))
    return PackedRows(encoded.to_iter_dataset(READ_OPTIONS), seq_len=seq_len)


def _deal(rows: list[Example], layout: SequenceLayout) -> Batch:
    """Stack rows and reorder them from natural to layout order: the one place that does."""
    return {name: layout.permute(np.stack([row[name] for row in rows]), axis=1) for name in rows[0]}


def _counted_targets(segment: Example) -> np.ndarray:
    return segment["targets"][segment["loss_mask"] == 1]


def _require_sizes(layout: SequenceLayout, **sizes: int) -> None:
    for name, size in sizes.items():
        require(size > 0, f"{name}={size} must be positive; choose at least 1")
    layout.check_length(sizes["seq_len"])


def _describe(corpus: dict) -> str:
    return "{documents} training documents (digest {digest}) shuffled by data.seed={seed}".format(**corpus)
