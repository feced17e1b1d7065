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
        """Raise ValueError unless `seq_len` tokens can be dealt in this layout."""
        pieces, name = self.ring_size, "the ring size sp"
        other = ""
        if self.kind == "zigzag":
            pieces, name = 2 * self.ring_size, "2*sp (zigzag)"
            other = ' or use layout="striped"' if seq_len % self.ring_size == 0 else ""
        padded = -(-seq_len // pieces) * pieces
        require_divisible("seq_len", seq_len, name, pieces, f"pad to {padded}{other}")

    def shard_positions(self, shard: int | jax.Array, shard_len: int) -> jax.Array:
        """Natural positions, int32 [shard_len], of the tokens that shard number `shard` holds (it may be traced)."""
        offset = jnp.arange(shard_len, dtype=jnp.int32)
        if self.kind == "contiguous":
            return shard * shard_len + offset
        if self.kind == "striped":
            return shard + self.ring_size * offset
        chunk = shard_len // 2
        late = (2 * self.ring_size - 1 - shard) * chunk
        return jnp.where(offset < chunk, shard * chunk + offset, late + offset - chunk)

    def positions(self, seq_len: int) -> np.ndarray:
        """int32 [seq_len]: the natural position of each token in layout order."""
        self.check_length(seq_len)
        natural = np.arange(seq_len, dtype=np.int32)
        if self.kind == "contiguous":
            return natural
        if self.kind == "striped":
            return natural.reshape(-1, self.ring_size).T.reshape(-1)
        chunks = natural.reshape(2, self.ring_size, -1)
        return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)

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
