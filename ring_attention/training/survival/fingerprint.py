"""A number for every array, to know later whether the array that came back is the one that was saved.

Storage may flip bits, and compressed chunks carry no checksum of their own. The number is a sum modulo 2**32 over the
array's words, each mixed with its place, so it does not depend on the mesh, the layout or the order of the sum: a
checkpoint of eight devices is checked on four. One changed word changes it for certain, more of them but for one case
in 2**32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: places get distinct words


def fingerprints(tree: Any) -> dict[str, int]:
    """Return the fingerprint of each array of a pytree, by dotted name.

    Computed on the devices, each its shards; every process of a run must call it.
    """
    words = jax.device_get(_fingerprints(jax.tree.leaves(tree)))
    return {name: int(word) for name, word in zip(leaf_names(tree), words, strict=True)}


def leaf_names(tree: Any) -> list[str]:
    """Name the leaves of a pytree by their paths, as in "params.layers.attention.query"."""
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)]


@jax.jit
def _fingerprints(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_fingerprint(x) for x in arrays]


def _fingerprint(x: jax.Array) -> jax.Array:
    words, place = _words(x), jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words ^ (place * jnp.uint32(GOLDEN))), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32: one word for each element of up to four bytes, several for longer ones."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of 32-bit words in which every bit depends on every other."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
