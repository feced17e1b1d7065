"""Loss by position in the document: what tokens further back are worth to a model.

Documents are read one a row from their beginning, none packed with another, so that a token's position is how much
context it has. Only documents that fill the row count: every position is then measured on the same documents, and the
curve does not mix short ones with long ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from ring_attention.checks import require_field
from ring_attention.data.sources import Document
from ring_attention.data.tokenizers import Tokenizer
from ring_attention.models.transformer import model_builder, parameter_specs
from ring_attention.parallel.mesh import SEQUENCE, compiler_options
from ring_attention.training.attend import attention_of
from ring_attention.training.config import AttentionConfig, TrainConfig
from ring_attention.training.step import BATCH_SPEC

FIRST_EDGE = 16
"""End of the first bin of positions; each further one ends at twice the last."""


def bin_edges(length: int) -> np.ndarray:
    """int64 [bins+1]: 0, FIRST_EDGE and its doubles below `length`, and `length`. Bin i begins at edges[i]."""
    doubles = [FIRST_EDGE << i for i in range(64) if FIRST_EDGE << i < length]
    return np.array([0, *doubles, length])


def long_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    length: int,
    most: int,
    start: Sequence[int] | None = None,
) -> np.ndarray:
    """int32 [documents, length+1]: the beginnings of the first `most` documents that have so many tokens.

    The first tokens are `start`, by default the one that opens a document.

    Raises:
      ConfigError: if there is none.
    """
    start = [tokenizer.document_start] if start is None else list(start)
    rows, longest = [], 0
    for document in documents:
        tokens = tokenizer.encode(document.text, special_tokens=False)
        longest = max(longest, len(start) + tokens.size - 1)
        if len(start) + tokens.size > length:
            rows.append(np.concatenate([start, tokens])[: length + 1])
        if len(rows) == most:
            break
    need = f"no document has so many tokens, the longest has {longest:,}"
    require_field(bool(rows), "length", length, need, f"use --length={max(1, longest)} or less, or other --paths")
    return np.array(rows, np.int32)


class LossReader:
    """Losses of a model at every position, for one attention."""

    def __init__(self, config: TrainConfig, attention: AttentionConfig, params: Any, mesh: Mesh):
        """`params` as `TrainedModel.load` gives them; `attention` may have another window than the config's."""
        self._params, self._mesh, self._model = params, mesh, config.model
        self._layout = attention.make_layout(mesh.shape[SEQUENCE])
        self._program_for = functools.cache(functools.partial(make_loss_program, config, attention, mesh))

    def losses(self, documents: np.ndarray, *, rows: int) -> np.ndarray:
        """Nats, float32 [n,T], of documents [n,T+1], n <= `rows`, a multiple of the devices that share the rows."""
        n, T = documents.shape[0], documents.shape[1] - 1
        padded = np.zeros((2, rows, self._layout.padded_length(T)), np.int32)  # at the end: nothing before looks there
        padded[0, :n, :T], padded[1, :n, :T] = documents[:, :-1], documents[:, 1:]
        dealt = self._layout.permute(padded, 2)
        sharding = NamedSharding(self._mesh, BATCH_SPEC)
        program = self._program_for(self._model.scaled_length(T))
        nats = program(self._params, *(jax.device_put(part, sharding) for part in dealt))
        return self._layout.unpermute(np.asarray(nats), 1)[:n, :T]


def make_loss_program(config: TrainConfig, attention: AttentionConfig, mesh: Mesh, length: int):
    """losses(params, tokens, targets) -> nats float32 [B,T], compiled for `mesh`; all in the layout's order.

    `length`, of the documents without padding, is what the rotary scalings "dynamic" and "longrope" go by.
    """
    model, P = attention.completed(config.model), mesh.shape[SEQUENCE]
    build, attend, layout = model_builder(model), attention_of(attention, model, P), attention.make_layout(P)

    def on_device(params, tokens_bt, targets_bt):
        positions_bt = jnp.broadcast_to(
            layout.shard_positions(lax.axis_index(SEQUENCE), tokens_bt.shape[1]), tokens_bt.shape
        )
        model = build(params)
        tokens = dict(positions=positions_bt, segment_ids=None, length=length)
        return model.token_losses(tokens_bt, targets_bt, attend=attend, **tokens)

    specs = (parameter_specs(config.transformer), BATCH_SPEC, BATCH_SPEC)
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=BATCH_SPEC)
    return jax.jit(sharded, compiler_options=compiler_options(mesh))


@dataclasses.dataclass(frozen=True)
class PositionLoss:
    """Losses of n documents in bins of positions.

    Attributes:
      nats: float64 [n, bins], the mean over a document's tokens in the bin.
      num_bytes: int64 [n, bins], that these tokens stand for.
      sizes: int64 [bins], tokens of a document in the bin.
    """

    nats: np.ndarray
    num_bytes: np.ndarray
    sizes: np.ndarray

    def mean(self) -> np.ndarray:
        """Nats per token, [bins]."""
        return self.nats.mean(0)

    def error(self) -> np.ndarray:
        """Standard error of `mean` over documents, [bins]; NaN for a single document."""
        return standard_error(self.nats)

    def bits_per_byte(self) -> np.ndarray:
        """Bits per byte of all documents together, [bins]."""
        return (self.nats.sum(0) * self.sizes) / (self.num_bytes.sum(0) * math.log(2))

    def more_than(self, other: "PositionLoss") -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard error), [bins] each, of what a document costs more nats per token than in `other`."""
        return (self.nats - other.nats).mean(0), standard_error(self.nats - other.nats)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the first axis; NaN where there is one value."""
    n = len(values)
    return values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full(values.shape[1:], np.nan)


def count_bytes(documents: np.ndarray, tokenizer: Tokenizer, edges: np.ndarray) -> np.ndarray:
    """int64 [n, bins]: bytes that the targets of each bin stand for."""
    bins = list(zip(edges[:-1], edges[1:], strict=True))
    return np.array([[len(tokenizer.token_bytes(row[1 + lo : 1 + hi])) for lo, hi in bins] for row in documents])


def measure_position_loss(
    losses: Callable[..., np.ndarray],
    documents: np.ndarray,
    tokenizer: Tokenizer,
    *,
    rows: int,
    advance: Callable[[int], None] = lambda done: None,
) -> PositionLoss:
    """Read all documents, [n,T+1], `rows` at a time; `losses` as `LossReader.losses`, `advance` is told of how many."""
    edges, nats = bin_edges(documents.shape[1] - 1), []
    for first in range(0, len(documents), rows):
        batch = documents[first : first + rows]
        read = losses(batch, rows=rows).astype(np.float64)
        nats += [[row[lo:hi].mean() for lo, hi in zip(edges[:-1], edges[1:], strict=True)] for row in read]
        advance(len(batch))
    return PositionLoss(np.array(nats), count_bytes(documents, tokenizer, edges), np.diff(edges))
