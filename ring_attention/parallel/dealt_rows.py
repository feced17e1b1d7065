"""Layouts that are data: rows of packed documents, each dealt to the devices of a ring by a table of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.axis_types import type_of, with_auto_axes
from ring_attention.checks import is_whole, require, require_divisible, require_integers, shown
from ring_attention.parallel.dealing import Chunks, deal_documents, require_speeds, run_lengths

MOST_CHUNKS = 16
"""The most chunks of a shard, where nobody says how many."""
LEAST_CHUNK = 128
"""The fewest tokens of a chunk, where nobody says how many chunks there are and shards are long enough."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DealtRows:
    """The layout of a batch each of whose rows is dealt by a table of its own; it may be traced, so it is data.

    Of P*n equal chunks of row b, shard i holds those that `table[b, i]` names, in this order. `deal_documents` makes a
    row's table and `SequenceLayout.for_documents` those of a batch.

    Attributes:
      table: int32 [B, P, n], of NumPy or JAX; each row holds the numbers 0 ... P*n - 1 once each.
    """

    table: Any

    @property
    def ring_size(self) -> int:
        """P, the number of shards."""
        return self.table.shape[1]

    @property
    def chunks_per_shard(self) -> int:
        """n, the number of chunks that a shard holds."""
        return self.table.shape[2]

    def check(self, batch: int, seq_len: int) -> None:
        """Raise ValueError unless these are tables of `batch` rows of `seq_len` tokens, each chunk dealt once.

        What the tables hold is looked at only in NumPy arrays.
        """
        require_integers("table", self.table, (batch, None, None), "BPn")
        chunks = self.ring_size * self.chunks_per_shard
        remedy = f"pad to {self.padded_length(seq_len)}, or deal the rows in fewer chunks"
        require_divisible("seq_len", seq_len, "ring_size * chunks_per_shard", chunks, remedy)
        whole = not isinstance(self.table, np.ndarray) or bool((np.sort(self._order(), 1) == np.arange(chunks)).all())
        require(
            whole, f"table does not hold each of {chunks} chunks once in every row; use SequenceLayout.for_documents"
        )

    def padded_length(self, seq_len: int) -> int:
        """The least number of tokens, `seq_len` or more, that can be dealt in equal chunks."""
        chunks = self.ring_size * self.chunks_per_shard
        return -(-seq_len // chunks) * chunks

    def shard_positions(self, shard: int | jax.Array, shard_len: int) -> jax.Array:
        """Natural positions, int32 [B, shard_len], of the tokens that shard number `shard` holds (it may be traced)."""
        own = jax.lax.dynamic_index_in_dim(jnp.asarray(self.table, jnp.int32), shard, axis=1, keepdims=False)
        return _positions(jnp, own, shard_len // self.chunks_per_shard)

    def positions(self, seq_len: int):
        """int32 [B, seq_len]: the natural position of each token in layout order; of NumPy if the table is."""
        xp = np if isinstance(self.table, np.ndarray) else jnp
        order = self._order()
        return _positions(xp, order.astype(xp.int32), seq_len // order.shape[1])

    def permute(self, x, axis: int = 1):
        """Reorder `axis`, not the first, of a NumPy or JAX array [B, ...] from natural to layout order, row by row."""
        return self._reordered(x, axis, back=False)

    def unpermute(self, x, axis: int = 1):
        """Reorder `axis`, not the first, of a NumPy or JAX array [B, ...] from layout order back to natural order."""
        return self._reordered(x, axis, back=True)

    def visible_pairs(self, segment_ids) -> np.ndarray:
        """float64 [B, P]: the pairs of a query and a key that it sees, under a causal mask, of each shard's queries.

        `segment_ids` are integers [B, T] in natural order; a token sees those of its own segment up to itself.
        """
        segment_ids = np.asarray(segment_ids)
        self.check(*segment_ids.shape)
        seen = np.stack([_seen(row) for row in segment_ids])
        return self.permute(seen).reshape(len(seen), self.ring_size, -1).sum(-1, dtype=np.float64)

    def hops(self, segment_ids) -> np.ndarray:
        """int64 [B, 2]: how many places (forth, back) a ring sends keys for each row, the fewest that do.

        `segment_ids` are integers [B, T] in natural order, with the documents one after the other.
        """
        segment_ids = np.asarray(segment_ids)
        self.check(*segment_ids.shape)
        rows = zip(np.asarray(self.table), segment_ids, strict=True)
        return np.array([Chunks.of(run_lengths(row), *table.shape).hops(_devices(table)) for table, row in rows])

    def _order(self):
        return self.table.reshape(len(self.table), -1)

    def _reordered(self, x, axis: int, *, back: bool):
        axis = range(x.ndim)[axis]
        require(axis > 0, "axis=0 is the batch, need the axis of the tokens; use axis=1 for arrays [B,T,...]")
        require(
            len(x) == len(self.table) and x.shape[axis] % (self.ring_size * self.chunks_per_shard) == 0,
            f"x has shape {x.shape} with tokens along axis {axis}, need {len(self.table)} rows of a multiple of "
            f"{self.ring_size} * {self.chunks_per_shard} tokens; give the batch that the table was made for",
        )
        is_numpy = isinstance(x, np.ndarray) and isinstance(self.table, np.ndarray)
        return with_auto_axes(_take_chunks, (axis, back), (x, self._order()), None if is_numpy else type_of(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentDealing:
    """How batches of packed documents are dealt, each row by its own documents.

    Attributes:
      ring_size: P, devices of the ring.
      chunks_per_shard: n, into how many chunks a shard falls; None: `default_chunks` of its length.
      speeds: of each device along the ring; () where they are alike.
    """

    ring_size: int
    chunks_per_shard: int | None = None
    speeds: tuple[float, ...] = ()

    def __post_init__(self):
        P = self.ring_size
        require(is_whole(P, 1), f"ring_size={shown(P)} must be positive and whole; use mesh.shape['sp']")
        speeds = require_speeds(self.speeds) if self.speeds else ()
        require(len(speeds) in (0, P), f"speeds are {len(speeds)}, need ring_size={P}; give one to each device")

    def check_length(self, seq_len: int) -> None:
        """Raise ValueError unless `seq_len` tokens can be dealt in equal chunks."""
        require(seq_len > 0, f"seq_len={seq_len} must be positive; choose at least {self.ring_size}")
        P, shards = self.ring_size, -(-seq_len // self.ring_size)
        require_divisible("seq_len", seq_len, "the ring size sp", P, f"pad to {shards * P}")
        n = self.chunks_per_shard or 1
        remedy = f"pad to {-(-seq_len // (P * n)) * P * n}, or choose fewer chunks"
        require_divisible("seq_len", seq_len, "ring_size * chunks_per_shard", P * n, remedy)

    def deal(self, segment_ids) -> DealtRows:
        """Deal rows by their segment ids, integers [B, T] in natural order; ValueError for others."""
        segment_ids = np.asarray(segment_ids)
        require_integers("segment_ids", segment_ids, (None, None), "BT")
        require(
            segment_ids.size > 0, f"segment_ids have shape {segment_ids.shape}, need at least 1 token; give a batch"
        )
        P, seq_len = self.ring_size, segment_ids.shape[1]
        self.check_length(seq_len)
        n = default_chunks(seq_len // P) if self.chunks_per_shard is None else self.chunks_per_shard
        tables = [deal_documents(run_lengths(row), P, n, self.speeds or None) for row in segment_ids]
        return DealtRows(np.stack(tables))


def default_chunks(shard_len: int) -> int:
    """How many chunks a shard of so many tokens falls into: at most 16 of at least 128 tokens, or 4 shorter ones."""
    most = max(4, min(MOST_CHUNKS, shard_len // LEAST_CHUNK))
    return max(n for n in range(1, most + 1) if shard_len % n == 0)


def _devices(table: np.ndarray) -> np.ndarray:
    """Return the device of each chunk, int [P*n]."""
    return np.argsort(table.reshape(-1), kind="stable") // table.shape[1]


def _seen(segment_ids: np.ndarray) -> np.ndarray:
    """int64 [T]: how many keys each token of a row sees, the tokens of its segment up to itself."""
    order = np.argsort(segment_ids, kind="stable")
    numbers = np.arange(len(order))
    lengths = run_lengths(segment_ids[order])
    seen = np.empty_like(numbers)
    seen[order] = numbers - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    return seen


def _positions(xp, chunks, chunk: int):
    """int32 [B, n*chunk], of chunk numbers [B, n]."""
    positions = chunks[..., None] * xp.int32(chunk) + xp.arange(chunk, dtype=xp.int32)
    return positions.reshape(len(chunks), -1)


def _take_chunks(how: tuple[int, bool], x, order):
    axis, back = how
    xp: Any = np if isinstance(x, np.ndarray) and isinstance(order, np.ndarray) else jnp
    order = xp.argsort(order, axis=1) if back else order
    chunks = x.reshape(*x.shape[:axis], order.shape[1], -1, *x.shape[axis + 1 :])
    index = order.reshape(len(order), *[1] * (axis - 1), -1, *[1] * (chunks.ndim - axis - 1))
    return xp.take_along_axis(chunks, index, axis=axis).reshape(x.shape)
