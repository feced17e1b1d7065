"""Layouts: the order in which the tokens of a sequence are dealt to the devices of a ring."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.axis_types import type_of, with_auto_axes
from ring_attention.attention.masks import Runs
from ring_attention.checks import is_whole, require, require_choice, require_divisible, shown
from ring_attention.parallel.dealing import require_speeds
from ring_attention.parallel.dealt_rows import DealtRows, DocumentDealing

LAYOUT_KINDS = ("contiguous", "zigzag", "striped")
MOST_TOKENS = 2**31 - 1
"""The longest sequence: positions are int32."""


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """Which tokens each of `ring_size` equal shards holds, and in which order.

    Which device (row) has which of 8 tokens, in this order, with 2 devices:

        contiguous    zigzag        striped       striped, stripe=2    dealt, chunks=((0, 1), (2, 3))
        0 1 2 3       0 1 6 7       0 2 4 6       0 1 4 5              0 1 2 3
        4 5 6 7       2 3 4 5       1 3 5 7       2 3 6 7              4 5 6 7

    With T tokens, t = T / ring_size of them a shard, shard i holds:
      contiguous  the tokens i*t ... (i+1)*t - 1. Under a causal mask the last shard has twice the average work.
      zigzag      of 2*ring_size equal chunks the i-th and the i-th from the end, so that work is even.
      striped     every ring_size-th token, from token i on (Brandon et al. 2023, Striped Attention), even too; stripes
                  of more than one token with `stripe`.
      dealt       of n*ring_size equal chunks those n that `chunks[i]` names; see `for_speeds`.
      given       tokens whose positions are an array beside them, which travels with keys; see `for_documents`.

    Positions of the others are exact integers computed from the shard's index, so no device ever has to send them.
    """

    kind: str
    ring_size: int
    stripe: int = 1
    chunks: tuple[tuple[int, ...], ...] = ()
    given_chunks: int = 0  # of a given layout, how many runs of consecutive tokens make a shard; 0 if unknown

    def __post_init__(self):
        if self.kind != "given":
            require_choice("layout", self.kind, (*LAYOUT_KINDS, "dealt") if self.chunks else LAYOUT_KINDS)
        ring_size = shown(self.ring_size)
        require(is_whole(self.ring_size, 1), f"ring_size={ring_size} must be positive and whole; use mesh.shape['sp']")
        fits = is_whole(self.stripe, 1) and (self.stripe == 1 or self.kind == "striped")
        require(
            fits, f"stripe={shown(self.stripe)} with layout={self.kind!r}; need 1, or more in striped layouts alone"
        )
        dealt = sorted(chunk for shard in self.chunks for chunk in shard)
        require(
            not self.chunks or (self.kind == "dealt" and dealt == list(range(self.ring_size * self.chunks_per_shard))),
            f"chunks={self.chunks} with layout={self.kind!r} and ring_size={self.ring_size}; need a dealt layout with "
            "each chunk once; use SequenceLayout.for_speeds",
        )

    @staticmethod
    def for_speeds(speeds: Sequence[float], chunks_per_shard: int = 16) -> "SequenceLayout":
        """A layout in which the causal work of each device is proportional to its speed, as far as that can go.

        All shards are equal in size, because all devices run one program; those of fast devices hold later tokens,
        which see more. From the last chunk to the first, each goes to the device that needs the most work for each
        chunk it may still take. Device i of P can so do between 1/P^2 and (2P-1)/P^2 of all work (with P=2 between 1/4
        and 3/4, with P=8 between 1/64 and 15/64); `work_shares` tells what it does.

        Args:
          speeds: of each device along the ring, in any unit.
          chunks_per_shard: into how many chunks a shard falls. More of them follow the speeds more closely; kernels
            are at their best if a chunk is as long as a tile.

        Raises:
          ValueError: for a speed that is not positive, or no chunks.
        """
        speeds = require_speeds(speeds)
        P, n = len(speeds), chunks_per_shard
        require(is_whole(n, 1), f"chunks_per_shard={shown(n)} must be positive; leave it out to take the default")
        need = [(P * n) ** 2 / 2 * speed / sum(speeds) for speed in speeds]
        shards = [[] for _ in speeds]
        for chunk in reversed(range(P * n)):
            free = [i for i in range(P) if len(shards[i]) < n]
            taker = max(free, key=lambda i: need[i] / (n - len(shards[i])))
            need[taker] -= chunk + 0.5
            shards[taker].append(chunk)
        return SequenceLayout("dealt", P, chunks=tuple(tuple(sorted(shard)) for shard in shards))

    @staticmethod
    def for_documents(
        segment_ids, ring_size: int, *, chunks_per_shard: int | None = None, speeds: Sequence[float] | None = None
    ) -> DealtRows:
        """The layout of a batch of packed documents, as data: work is even, and keys go no farther than that needs.

        Args:
          segment_ids: integers [B, T] in natural order, of NumPy; tokens in a row that are alike are a document.
          ring_size: P, devices of the ring; it divides T.
          chunks_per_shard: into how many chunks a shard falls, T / P divisible by it; by default up to 16, of at least
            128 tokens. More of them balance better; kernels are at their best if a chunk is as long as a tile.
          speeds: of each device along the ring, in any unit; work is proportional to them. Equal by default.

        Raises ValueError for ids that are no integers [B, T], and sizes or speeds that do not fit.
        """
        speeds = () if speeds is None else tuple(require_speeds(speeds))
        return DocumentDealing(ring_size=ring_size, chunks_per_shard=chunks_per_shard, speeds=speeds).deal(segment_ids)

    def work_shares(self, seq_len: int) -> np.ndarray:
        """float64 [ring_size]: the share of each shard in all pairs of a query and a key that a causal mask shows.

        Raises ValueError for a length that cannot be dealt in equal shards.
        """
        self.check_length(seq_len)
        positions = self.positions(seq_len).reshape(self.ring_size, -1)
        pairs = (positions + 1).sum(1, dtype=np.float64)
        return pairs / pairs.sum()

    def check_length(self, seq_len: int) -> None:
        """Raise ValueError unless `seq_len` tokens can be dealt in equal shards."""
        fits = is_whole(seq_len, 1) and seq_len <= MOST_TOKENS
        need = f"must be a whole number from 1 to {MOST_TOKENS}, since positions are int32"
        require(fits, f"seq_len={shown(seq_len)} {need}; choose at least {self._pieces}")
        per_device = self._pieces // self.ring_size
        name = "the ring size sp" if per_device == 1 else f"{per_device}*sp ({self.kind})"
        other = ' or use layout="striped"' if self._pieces > self.ring_size and seq_len % self.ring_size == 0 else ""
        remedy = f"pad to {self.padded_length(seq_len)}{other}"
        require_divisible("seq_len", seq_len, name, self._pieces, remedy)

    def padded_length(self, seq_len: int) -> int:
        """The least number of tokens, `seq_len` or more, that can be dealt in equal shards."""
        return -(-seq_len // self._pieces) * self._pieces

    @property
    def _pieces(self) -> int:
        """What the number of tokens must be divisible by."""
        return self.ring_size * (self.stripe if self.kind == "striped" else self.chunks_per_shard)

    @property
    def chunks_per_shard(self) -> int:
        """How many runs of consecutive tokens a shard holds, where their number does not depend on its length."""
        require(self.kind != "striped", "striped shards have no fixed number of chunks; use contiguous or zigzag")
        return len(self.chunks[0]) if self.chunks else 2 if self.kind == "zigzag" else self.given_chunks or 1

    def shard_positions(self, shard: int | jax.Array, shard_len: int) -> jax.Array:
        """Natural positions, int32 [shard_len], of the tokens that shard number `shard` holds (it may be traced)."""
        require(self.kind != "given", 'layout="given" needs positions; give positions=, or another layout')
        offset = jnp.arange(shard_len, dtype=jnp.int32)
        if self.kind == "striped":
            if self.stripe == 1:
                return shard + self.ring_size * offset
            round_, within = offset // self.stripe, offset % self.stripe
            return (round_ * self.ring_size + shard) * self.stripe + within
        starts = self.chunk_starts(shard, shard_len)
        chunk = shard_len // len(starts)
        return jnp.concatenate([start + offset[:chunk] for start in starts])

    def chunk_starts(self, shard: int | jax.Array, shard_len: int) -> list:
        """Natural positions at which the runs of consecutive tokens of a shard begin; not for striped."""
        chunk = shard_len // self.chunks_per_shard
        if self.kind == "contiguous":
            return [shard * chunk]
        if self.kind == "zigzag":
            return [shard * chunk, (2 * self.ring_size - 1 - shard) * chunk]
        table = np.array(self.chunks, np.int32)
        own = table[shard] if isinstance(shard, int) else jnp.asarray(table)[shard]
        return [own[n] * chunk for n in range(self.chunks_per_shard)]

    def all_positions(self, shard_len: int) -> jax.Array:
        """Natural positions, int32 [ring_size, shard_len], of all shards; computed where they are needed."""
        return jax.vmap(lambda shard: self.shard_positions(shard, shard_len))(
            jnp.arange(self.ring_size, dtype=jnp.int32)
        )

    def runs(self, shard_len: int, start: int = 0, stop: int | None = None) -> Runs | None:
        """The tokens from `start` to `stop` of any shard, as runs; None for stripes, many short ones, or unknown."""
        stop, shards = shard_len if stop is None else stop, range(self.ring_size)
        if self.kind == "given" and not self.given_chunks:
            return None
        if self.kind == "striped":
            starts = tuple((shard + self.ring_size * start,) for shard in shards)
            return Runs((stop - start,), self.ring_size, starts) if self.stripe == 1 else None
        chunk = shard_len // self.chunks_per_shard
        cuts = [start, *(cut for cut in range(0, shard_len, chunk) if start < cut < stop), stop]
        lengths = tuple(after - before for before, after in itertools.pairwise(cuts))
        chunks = [] if self.kind == "given" else [self.chunk_starts(shard, shard_len) for shard in shards]
        starts = tuple(tuple(int(own[cut // chunk]) + cut % chunk for cut in cuts[:-1]) for own in chunks)
        return Runs(lengths, 1, starts)

    def in_order(self, x, axis: int, back: bool = False):
        """Reorder `axis` of an array of all shards, one after the other, to the order of positions, or back.

        Whole chunks are moved. Stripes stay as they are: their tokens are spaced as those of a shard, and kernels ask
        for that.
        """
        if self.kind in ("striped", "given") or not (order := self._order_of_chunks()):
            return x
        chunks = x.reshape(*x.shape[:axis], len(order), -1, *x.shape[axis + 1 :])
        return chunks.take(np.argsort(order) if back else np.array(order), axis=axis).reshape(x.shape)

    def _order_of_chunks(self) -> list[int]:
        """The numbers of all shards' chunks by their positions; [] where they stand so."""
        starts = [start for shard in range(self.ring_size) for start in self.chunk_starts(shard, self.chunks_per_shard)]
        order = sorted(range(len(starts)), key=starts.__getitem__)
        return [] if order == sorted(order) else order

    def all_runs(self, shard_len: int) -> Runs | None:
        """The tokens of all shards as runs, in the order of `in_order`."""
        own, order = self.runs(shard_len), list if self.kind == "striped" else sorted
        starts = tuple(order(itertools.chain(*own.starts))) if own else ()
        return own and Runs(own.lengths * self.ring_size, own.step, (starts,) if starts else ())

    def positions(self, seq_len: int) -> np.ndarray:
        """int32 [seq_len]: the natural position of each token in layout order.

        A length that cannot be dealt in equal shards is dealt as if it were padded at its end, the padding left out.
        """
        natural = np.arange(self.padded_length(seq_len), dtype=np.int32)
        if self.kind == "contiguous":
            order = natural
        elif self.kind == "striped":
            order = natural.reshape(-1, self.ring_size, self.stripe).swapaxes(0, 1).reshape(-1)
        elif self.kind == "zigzag":
            chunks = natural.reshape(2, self.ring_size, -1)
            order = np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)
        else:
            order = natural.reshape(self.ring_size * self.chunks_per_shard, -1)[np.ravel(self.chunks)].reshape(-1)
        return order[order < seq_len]

    def merged(self, size: int) -> "SequenceLayout":
        """The layout of rings of ring_size / size places, each with the tokens of `size` consecutive shards.

        In the merged shard they are in another order than side by side, but in the same other order in every one.
        """
        require_divisible("ring_size", self.ring_size, "the shards that are merged", size, "merge a divisor of them")
        if size == 1:
            return self
        places = self.ring_size // size
        if self.kind == "given":
            return SequenceLayout("given", places, given_chunks=self.given_chunks * size)
        if places == 1:
            return SequenceLayout("contiguous", 1)
        require(
            self.kind != "dealt",
            f"{size} of the {self.ring_size} shards of a layout for devices of different speeds cannot be merged; "
            f"use all of them, none, or another layout",
        )
        return SequenceLayout(self.kind, places, stripe=self.stripe * (size if self.kind == "striped" else 1))

    def permute(self, x, axis: int):
        """Reorder `axis` of a NumPy or JAX array from natural to layout order."""
        return self._reordered(x, axis, back=False)

    def unpermute(self, x, axis: int):
        """Reorder `axis` of a NumPy or JAX array from layout order back to natural order."""
        return self._reordered(x, axis, back=True)

    def _reordered(self, x, axis: int, *, back: bool):
        if self.kind == "contiguous":
            return x
        return with_auto_axes(_take, (self, axis, back), (x,), None if isinstance(x, np.ndarray) else type_of(x))


def _take(how: tuple[SequenceLayout, int, bool], x):
    layout, axis, back = how
    order = layout.positions(x.shape[axis])
    return x.take(np.argsort(order) if back else order, axis=axis)


def as_layout(layout: "str | SequenceLayout", ring_size: int) -> SequenceLayout:
    """A SequenceLayout from its name, or the one given if it fits the ring."""
    if isinstance(layout, str):
        return SequenceLayout(layout, ring_size)
    if not isinstance(layout, SequenceLayout):
        require_choice("layout", layout, LAYOUT_KINDS)
    remedy = f"SequenceLayout({layout.kind!r}, {ring_size})"
    if layout.kind == "dealt":
        remedy = f"SequenceLayout.for_speeds with {ring_size} speeds"
    require(
        layout.ring_size == ring_size,
        f"layout is for ring_size={layout.ring_size}, but the mesh axis has {ring_size} devices; use {remedy}",
    )
    return layout


def parse_speeds(words: str) -> list[float]:
    """Speeds of devices, from numbers with spaces between; raises ValueError for anything else."""
    try:
        speeds = [float(word) for word in words.split()]
    except ValueError:
        speeds = []
    fits = len(speeds) > 0 and all(0 < speed < math.inf for speed in speeds)
    require(fits, f'speeds={shown(words)} must be positive numbers with spaces between; for example "1 1 0.5 1"')
    return speeds
