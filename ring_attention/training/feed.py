"""Batches on the devices: a process loads the rows that its devices hold, and gives each device its part of them."""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ring_attention.checks import ConfigError
from ring_attention.data.loader import Batch, TrainLoader, merge_states
from ring_attention.parallel.mesh import SEQUENCE
from ring_attention.training.config import TrainConfig
from ring_attention.training.corpus import Corpus
from ring_attention.training.step import BATCH_SPEC
from ring_attention.training.survival.errors import RunError


class Feed:
    """An endless iterator of (this process's rows as NumPy arrays, the whole batch as sharded jax arrays).

    Raises RunError where a document can no longer be read as it was when the run began.

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
            layout=config.attention.make_layout(mesh.shape[SEQUENCE]),
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
    """Return `batch`, which holds the `rows` of a batch of `batch_size`, as global arrays [batch_size, tokens]."""
    return {name: _place(values, rows, batch_size, sharding) for name, values in batch.items()}


def _place(values: np.ndarray, rows: list[int], batch_size: int, sharding: NamedSharding) -> jax.Array:
    def shard(index: tuple[slice, slice]) -> np.ndarray:
        begin, end, _ = index[0].indices(batch_size)
        first = rows.index(begin)
        return values[first : first + end - begin, index[1]]

    return jax.make_array_from_callback((batch_size, values.shape[1]), sharding, shard)


def _gather(state: dict) -> list[dict]:
    """Return what each process gave, in their order."""
    if jax.process_count() == 1:
        return [state]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - text.size)))
    return [json.loads(bytes(row[:length])) for row, length in zip(texts, lengths, strict=True)]
