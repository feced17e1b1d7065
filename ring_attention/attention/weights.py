"""From the products of some queries and keys to their scores, and what a backward pass needs of that."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_attention.attention import dropout
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import Tokens, visible

_LEAST = float(jnp.finfo(jnp.float32).min)


class BlockScores(NamedTuple):
    """Scores of some queries of the G heads of one group and some keys, with axes in any order.

    All arrays broadcast against each other: those of queries are for example [1,t,1], of keys [1,1,s] and of heads
    [G,1,1].

    Attributes:
      mask: of which only the static values and the seeds are used; the arrays for these heads follow.
      queries: tokens.
      keys: tokens.
      slopes: float32, of the heads, or None.
      batch: int32, global index of the sequence, or None without dropout.
      heads: int32, global indices of the heads, or None without dropout.
      masked: whether the mask may hide some of the keys.
    """

    mask: MaskSpec
    queries: Tokens
    keys: Tokens
    slopes: jax.Array | None
    batch: jax.Array | None
    heads: jax.Array | None
    masked: bool

    def scores(self, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """float32 scores, -inf where hidden, and d score / d (scale * product), None where that is 1 everywhere."""
        mask, scores, slope = self.mask, products * self.mask.factor, None
        if mask.softcap is not None:
            bent = jnp.tanh(scores / mask.softcap)
            scores, slope = mask.softcap * bent, 1 - bent**2
        if self.slopes is not None:
            distance = jnp.abs(self.queries.positions - self.keys.positions)
            scores -= self.slopes * distance.astype(jnp.float32)
        if self.keys.bias is not None:
            scores += self.keys.bias
        seen = visible(mask, self.queries, self.keys) if self.masked else None
        # Either way the product is rounded here. A compiler that fuses it with what is subtracted from it next, once in
        # one pass and not in the other, makes the dv of sharp attention several times as wrong (docs/accuracy.md).
        rounded = jnp.maximum(scores, _LEAST) if seen is None else jnp.where(seen, scores, -jnp.inf)
        return rounded, slope

    def dropout_factor(self) -> jax.Array | None:
        """What dropout multiplies each weight by, 0 or 1 / (1 - rate); None without dropout."""
        drop = self.mask.dropout
        if drop is None:
            return None
        query, key = self.queries.positions, self.keys.positions
        kept = dropout.kept(drop.rate, drop.seeds, self.batch, self.heads, query, key)
        return jnp.where(kept, jnp.float32(1 / (1 - drop.rate)), jnp.float32(0))
