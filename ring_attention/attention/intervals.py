"""For each query an interval of positions that it sees: prefixes, blocks that see themselves, chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Intervals(NamedTuple):
    """The positions from `start` to before `stop` that each query sees, int32 [B,T] or [1,T]; no key where they meet.

    With `causal=True` a query sees them beside what `causal` and `window` show, with `causal=False` nothing else, and
    of them only what `window` shows. Segments, padding and `extra_mask` hide keys of an interval, too. What the makers
    below give is in the natural order; `SequenceLayout.permute(x, 1)` of both arrays brings it into a layout's.

        prefix            blocks             chunks             chunks
        of 2, causal      0, 1, 1, 2, 3      of 2, causal       of 2, causal=False
                          causal             (block-causal)

        1 1 0 0 0         1 0 0 0 0          1 1 0 0 0          1 1 0 0 0
        1 1 0 0 0         1 1 1 0 0          1 1 0 0 0          1 1 0 0 0
        1 1 1 0 0         1 1 1 0 0          1 1 1 1 0          0 0 1 1 0
        1 1 1 1 0         1 1 1 1 0          1 1 1 1 0          0 0 1 1 0
        1 1 1 1 1         1 1 1 1 1          1 1 1 1 1          0 0 0 0 1

    Attributes:
      start: the first position of each.
      stop: the position after the last of each.
    """

    start: jax.Array
    stop: jax.Array

    @staticmethod
    def prefix(in_prefix: jax.Array, segment_ids: jax.Array | None = None) -> "Intervals":
        """Each document's prefix, which all of its tokens see: a prefix language model with `causal=True`.

        Args:
          in_prefix: bool [B,T], whether a token is of the prefix, the first tokens of its document.
          segment_ids: integers [B,T], the same for the tokens of a document, which follow each other; one by default.
        """
        in_prefix = jnp.asarray(in_prefix, bool)
        start, stop = _runs(jnp.zeros(in_prefix.shape, jnp.int32) if segment_ids is None else segment_ids)
        counted = jnp.cumsum(in_prefix, 1, dtype=jnp.int32)  # in all prefixes, up to and with each token
        before = jnp.pad(counted, ((0, 0), (1, 0)))
        tokens = jnp.take_along_axis(before, stop, 1) - jnp.take_along_axis(before, start, 1)
        return Intervals(start, start + tokens)

    @staticmethod
    def blocks(block_ids: jax.Array) -> "Intervals":
        """The block of each token, such as an image whose tokens see each other in a causal text.

        Args:
          block_ids: integers [B,T]; tokens that follow each other with the same number make a block, and those of a
            negative number, such as text, one each.
        """
        ids = jnp.asarray(block_ids)
        start, stop = _runs(ids)
        here = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        return Intervals(jnp.where(ids < 0, here, start), jnp.where(ids < 0, here + 1, stop))

    @staticmethod
    def chunks(positions: jax.Array, size: int, *, up_to_itself: bool = False) -> "Intervals":
        """The chunk of `size` positions that each token is in.

        With `causal=True` this is block-causal attention, as of diffusion models: a chunk sees itself and all before
        it. With `causal=False` a chunk sees itself alone, and with `up_to_itself` a token only the part of its chunk
        that is not after it (Llama 4).

        Args:
          positions: integers [B,T] or [T], from 0 in each sequence.
          size: of a chunk, in tokens.
          up_to_itself: whether the interval ends with the token.
        """
        positions = jnp.atleast_2d(jnp.asarray(positions, jnp.int32))
        start = positions // size * size
        return Intervals(start, positions + 1 if up_to_itself else start + size)


def _runs(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(start, stop) int32 [B,T]: where the run of equal ids that each token is in begins, and where it has ended."""
    ids = jnp.asarray(ids)
    number, length = jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape[1]
    first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(first, number, 0), 1)
    following = jnp.pad(jnp.where(first, number, length)[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return start, jax.lax.cummin(following, 1, reverse=True)
