"""Layouts: the order in which the tokens of a sequence are dealt to the devices of a ring."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.checks import require, require_choice, require_divisible

LAYOUT_KINDS = ("contiguous", "zigzag", "striped")


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """Which tokens each of `ring_size` equal shards holds, and in which order.

    With T tokens, t = T / ring_size of them a shard, shard i holds:
      contiguous  the tokens i*t ... (i+1)*t - 1. Under a causal mask the last shard has twice the average work.
      zigzag      of 2*ring_size equal chunks the i-th and the i-th from the end, so that work is even.
      striped     every ring_size-th token, from token i on (Brandon et al. 2023, Striped Attention), even too.

    Positions are exact integers computed from the shard's index, so no device ever has to send them.
    """

    kind: str
    ring_size: int

    def __post_init__(self):
        require_choice("layout", self.kind, LAYOUT_KINDS)
        require(self.ring_size > 0, f"ring_size={self.ring_size} must be positive")

    def check_length(self, seq_len: int) -> None:
        """Raise ValueError unless `seq_len` tokens can be dealt in equal shards."""
        name = "2*sp (zigzag)" if self.kind == "zigzag" else "the ring size sp"
        other = ' or use layout="striped"' if self.kind == "zigzag" and seq_len % self.ring_size == 0 else ""
        remedy = f"pad to {self.padded_length(seq_len)}{other}"
        require_divisible("seq_len", seq_len, name, self._pieces, remedy)

    def padded_length(self, seq_len: int) -> int:
        """The least number of tokens, `seq_len` or more, that can be dealt in equal shards."""
        return -(-seq_len // self._pieces) * self._pieces

    @property
    def _pieces(self) -> int:
        return 2 * self.ring_size if self.kind == "zigzag" else self.ring_size

    def shard_positions(self, shard: int | jax.Array, shard_len: int) -> jax.Array:
        """Natural positions, int32 [shard_len], of the tokens that shard number `shard` holds (it may be traced)."""
        offset = jnp.arange(shard_len, dtype=jnp.int32)
        if self.kind == "striped":
            return shard + self.ring_size * offset
        starts = self.chunk_starts(shard, shard_len)
        chunk = shard_len // len(starts)
        return jnp.concatenate([start + offset[:chunk] for start in starts])

    def chunk_starts(self, shard: int | jax.Array, shard_len: int) -> list:
        """Natural positions at which the runs of consecutive tokens of a shard begin; not for striped."""
        if self.kind == "contiguous":
            return [shard * shard_len]
        chunk = shard_len // 2
        return [shard * chunk, (2 * self.ring_size - 1 - shard) * chunk]

    def positions(self, seq_len: int) -> np.ndarray:
        """int32 [seq_len]: the natural position of each token in layout order.

        A length that cannot be dealt in equal shards is dealt as if it were padded at its end, the padding left out.
        """
        natural = np.arange(self.padded_length(seq_len), dtype=np.int32)
        if self.kind == "contiguous":
            order = natural
        elif self.kind == "striped":
            order = natural.reshape(-1, self.ring_size).T.reshape(-1)
        else:
            chunks = natural.reshape(2, self.ring_size, -1)
            order = np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)
        return order[order < seq_len]

    def permute(self, x, axis: int):
        """Reorder `axis` of a NumPy or JAX array from natural to layout order."""
        return self._take(x, self.positions(x.shape[axis]), axis)

    def unpermute(self, x, axis: int):
        """Reorder `axis` of a NumPy or JAX array from layout order back to natural order."""
        return self._take(x, np.argsort(self.positions(x.shape[axis])), axis)

    def _take(self, x, order: np.ndarray, axis: int):
        if self.kind == "contiguous":
            return x
        return x.take(order, axis=axis)


def as_layout(layout: "str | SequenceLayout", ring_size: int) -> SequenceLayout:
    """A SequenceLayout from its name, or the one given if it fits the ring."""
    if isinstance(layout, str):
        return SequenceLayout(layout, ring_size)
    require(
        layout.ring_size == ring_size,
        f"layout is for ring_size={layout.ring_size}, but the mesh axis has {ring_size} devices; "
        f"use SequenceLayout({layout.kind!r}, {ring_size})",
    )
    return layout
