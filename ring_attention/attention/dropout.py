"""Dropout of attention weights by counting: whether a weight is kept depends on where it stands, and on nothing else.

Random bits are a hash of the global (batch, head, query, key) of a weight and of a seed, so every ring size, layout and
tile size drops the same weights, and a backward pass draws again what the forward pass drew instead of keeping it.

The hash absorbs one word at a time into each of two 32-bit lanes; the last word, the key's position, is the only one
that a tile has to work on, and both lanes enter there. `mix` is an invertible 32-bit function in which each bit of the
result depends evenly on each bit of the argument (constants from the search by Wellons 2018, "hash prospector").
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
    """What to drop.

    Attributes:
      rate: fraction of the weights, 0 < rate < 1; those kept are divided by 1 - rate.
      seeds: uint32 [2].
      batch: int32 [B], global index of each sequence.
      heads: int32 [H], global index of each query head.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    seeds: jax.Array
    batch: jax.Array
    heads: jax.Array


def seeds_of(key: jax.Array) -> jax.Array:
    """uint32 [2] from a `jax.random` key, new style or old."""
    return jax.random.bits(key, (2,), jnp.uint32)


def mix(x: jax.Array) -> jax.Array:
    """Scramble uint32s, one to one."""
    x ^= x >> 16
    x *= jnp.uint32(0x21F0AAAD)
    x ^= x >> 15
    x *= jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def kept(rate: float, seeds, batch, head, query, key) -> jax.Array:
    """Bool: which weights are kept. The four indices are int32 and broadcast against each other.

    bits = mix(mix(a + key) ^ b), where lane a starts from seeds[0] and b from seeds[1], and each absorbs batch, head
    and query in turn by lane = mix(lane + index). Kept where bits >= round(rate * 2**32).
    """
    first, second = seeds[0], seeds[1]
    for index in (batch, head, query):
        word = index.astype(jnp.uint32)
        first, second = mix(first + word), mix(second + word)
    bits = mix(mix(first + key.astype(jnp.uint32)) ^ second)
    return bits >= jnp.uint32(round(rate * 2**32))
