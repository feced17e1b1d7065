"""Masks beside the usual ones: a subclass of `Mask` is all that another kind of mask needs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


class Mask:
    """A condition on positions, beside causal, window and segments: a query sees the keys that all of them show.

    A subclass is hashable, for instance a frozen dataclass, because programs depend on it. With `causal=False` this is
    a causal mask behind a prefix that everybody sees:

        @dataclasses.dataclass(frozen=True)
        class Prefix(Mask):
            length: int

            def visible(self, q_positions, k_positions):
                return (k_positions < self.length) | (q_positions >= k_positions)

        Prefix(length=2), a row for each query and a column for each key:
            1 1 0 0 0
            1 1 0 0 0
            1 1 1 0 0
            1 1 1 1 0
            1 1 1 1 1
    """

    def visible(self, q_positions: Any, k_positions: Any) -> Any:
        """Bool: which query sees which key, by their int32 natural positions, which broadcast against each other.

        Operators of arrays alone (`&`, `|`, `%`, comparisons) work for NumPy's, in the oracle, and JAX's.
        """
        raise NotImplementedError

    def bounds(self, q_low, q_high, k_low, k_high) -> tuple[jax.Array, jax.Array]:
        """Bool (nothing, everything): whether tiles between these positions, inclusive, show no key, and every key.

        True must be certain. A tile that shows nothing is then not computed, and one that shows everything is computed
        without the mask. By default neither is known.
        """
        unknown = jnp.zeros(jnp.broadcast_shapes(q_low.shape, k_low.shape), bool)
        return unknown, unknown


@dataclasses.dataclass(frozen=True)
class Chunks(Mask):
    """A token sees its own chunk of `size` consecutive tokens of the sequence (Llama 4's chunked attention)."""

    size: int

    def visible(self, q_positions: Any, k_positions: Any) -> Any:
        """Where both lie in one chunk."""
        return q_positions // self.size == k_positions // self.size

    def bounds(self, q_low, q_high, k_low, k_high) -> tuple[jax.Array, jax.Array]:
        """Nothing where all queries lie in other chunks than all keys, everything where all are in one."""
        first_q, last_q, first_k, last_k = (x // self.size for x in (q_low, q_high, k_low, k_high))
        nothing = (last_q < first_k) | (last_k < first_q)
        return nothing, (first_q == last_k) & (first_k == last_q) & (first_q == last_q)
