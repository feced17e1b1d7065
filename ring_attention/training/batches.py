"""From documents to batches on the devices: the corpus, the feed of training rows, and the held-out rows."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ring_attention.checks import ConfigError, printable
from ring_attention.data.bad_documents import DataReport
from ring_attention.data.config import DataConfig
from ring_attention.data.loader import Batch, TrainLoader, deal_batches, held_out_rows, merge_states, spell_rows
from ring_attention.data.sources import DocumentSource, open_documents, split_documents
from ring_attention.data.tokenizers import BYTES, Tokenizer, load_tokenizer
from ring_attention.parallel.mesh import SEQUENCE
from ring_attention.training.config import TrainConfig
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.step import BATCH_SPEC, make_eval_step

LOOKED_AT, LOOKED_AT_BYTES, NAMED = 32, 2**16, 3
"""Documents in which special tokens are looked for, and how far; how many of these are named."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents held out, the tokenizer that both go through, and what was left out."""

    train: DocumentSource
    held_out: DocumentSource
    tokenizer: Tokenizer
    report: DataReport

    @staticmethod
    def open(config: DataConfig, index_dir: Path | None = None) -> "Corpus":
        """Open and check the files; ConfigError for those that cannot be used.

        `index_dir` keeps what was found for the next start, unless `config.index_dir` names another place.
        """
        tokenizer = load_tokenizer(config.tokenizer)
        train, held_out = split_documents(open_documents(config, index_dir), config.holdout_fraction)
        return Corpus(train, held_out, tokenizer, train.report)

    def describe_tokens(self, config: DataConfig) -> list[str]:
        """Return lines on the tokens that stand around documents, and special tokens that the first few spell out."""
        if config.tokenizer == BYTES:
            return []
        lines = [self.tokenizer.in_words()]
        spelled = [] if config.special_tokens else self._spelled_tokens()
        if spelled:
            names = ", ".join(printable(name) for name in spelled[:NAMED])
            lines.append(
                f"Documents spell out special tokens, such as {names}: they are read as text. "
                "--config.data.special_tokens=true reads them as tokens."
            )
        return lines

    def _spelled_tokens(self) -> list[str]:
        """Return the special tokens whose spelling stands in the first LOOKED_AT held-out documents."""
        names = sorted(self.tokenizer.special_tokens.values())
        looked_at = range(min(LOOKED_AT, len(self.held_out)))
        texts = [self.held_out[number].text[:LOOKED_AT_BYTES] for number in looked_at]
        return [name for name in names if any(name.encode() in text for text in texts)]


class Feed:
    """An endless iterator of (this process's rows as NumPy arrays, the whole batch as sharded jax arrays).

    A process loads the rows that its devices hold, and gives each device its part of them. Raises RunError where a
    document can no longer be read as it was when the run began.

    Attributes:
      rows: the numbers of the batch's rows that this process loads, of `config.batch_size`.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, corpus: Corpus):
        self._sharding = NamedSharding(mesh, BATCH_SPEC)
        self._batch_size = config.batch_size
        self.rows = local_rows(self._sharding, (config.batch_size, config.seq_len))
        self._loader = TrainLoader(
            corpus.train,
            corpus.tokenizer,
            seed=config.data.seed,
            streams=config.data.streams,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            layout=config.attention.make_dealing(mesh.shape[SEQUENCE]),
            rows=self.rows,
            train_on_end=config.data.train_on_end,
            special_tokens=config.data.special_tokens,
        )

    def __next__(self) -> tuple[Batch, dict[str, jax.Array]]:
        try:
            batch = next(self._loader)
        except ConfigError as error:  # it was good when the run began: a file that changed, a file system that is away
            raise RunError(str(error)) from error
        return batch, place(batch, self.rows, self._batch_size, self._sharding)

    def get_state(self) -> dict:
        """Return where the data of all processes stands, fit for JSON; every process of the run must call it."""
        return merge_states(_gather(self._loader.get_state()))

    def set_state(self, state: dict) -> None:
        """Go where `get_state` was called, whatever the number of processes was then (`TrainLoader.set_state`)."""
        self._loader.set_state(state)


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> list[int]:
    """Return, ascending, the rows of an array [rows, tokens] that this process's devices hold parts of."""
    places = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for rows, _ in places for row in range(*rows.indices(shape[0]))})


def place(batch: Batch, rows: list[int], batch_size: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Return `batch`, which holds the `rows` of a batch of `batch_size`, as global arrays [batch_size, ...]."""
    return {name: _place(values, rows, batch_size, sharding) for name, values in batch.items()}


def _place(values: np.ndarray, rows: list[int], batch_size: int, sharding: NamedSharding) -> jax.Array:
    def shard(index: tuple[slice, ...]) -> np.ndarray:
        begin, end, _ = index[0].indices(batch_size)
        first = rows.index(begin)
        return values[first : first + end - begin, *index[1:]]

    return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard)


def _gather(state: dict) -> list[dict]:
    """Return what each process gave, in their order."""
    if jax.process_count() == 1:
        return [state]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - text.size)))
    return [json.loads(bytes(row[:length])) for row, length in zip(texts, lengths, strict=True)]


class HeldOut:
    """The fixed rows that a run is measured on: their text, without the ends of documents, which training counts too.

    Attributes:
      segments: the rows spelled in bytes, (context, predicted) for each segment.
      num_bytes: bytes that are predicted.
      bits_per_byte_of: bits per byte for one nat per token, on this text: tokens / (bytes * ln 2).
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, corpus: Corpus):
        rows = held_out_rows(
            corpus.held_out,
            corpus.tokenizer,
            seq_len=config.seq_len,
            num_sequences=config.eval_sequences,
            special_tokens=config.data.special_tokens,
        )
        layout = config.attention.make_dealing(mesh.shape[SEQUENCE])
        batches = deal_batches(rows, batch_size=config.micro_batch_size, layout=layout)
        sharding, every = NamedSharding(mesh, BATCH_SPEC), list(range(config.micro_batch_size))
        self._batches = [place(batch, every, config.micro_batch_size, sharding) for batch in batches]
        self._evaluate = make_eval_step(config, mesh)
        self.segments = spell_rows(rows, corpus.tokenizer)
        self.num_bytes = sum(len(predicted) for _, predicted in self.segments)
        self._num_targets = sum(int(row["loss_mask"].sum()) for row in rows)
        self.bits_per_byte_of = self._num_targets / (self.num_bytes * math.log(2))

    def loss(self, params) -> float:
        """Return the mean negative log-likelihood of `params` in nats per token."""
        sums = [self._evaluate(params, batch) for batch in self._batches]
        return sum(float(nats) for nats, _ in sums) / self._num_targets


def digests(config: DataConfig, corpus: Corpus) -> dict[str, str]:
    """Return field -> digest of what it stands for: the documents on either side of the split, and the tokenizer."""
    return {
        "data.paths (training documents)": f"{len(corpus.train):,} with digest {corpus.train.digest()}",
        "data.paths (held-out documents)": f"{len(corpus.held_out):,} with digest {corpus.held_out.digest()}",
        "data.tokenizer": f"digest {_tokenizer_digest(config.tokenizer)}",
    }


def _tokenizer_digest(tokenizer: str) -> str:
    content = BYTES.encode() if tokenizer == BYTES else Path(tokenizer).read_bytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
