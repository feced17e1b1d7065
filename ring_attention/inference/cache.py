"""The cache of keys and values: of the layers of a run, its slots dealt to the devices of a ring like stripes.

Position p of a row lies on device p % P in slot p // P. So rows of any length fill the devices evenly, a prompt that
was prefilled in the striped layout lies in the first slots of each, and so does a token that is appended later.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ring_attention.attention.cached import as_bits
from ring_attention.attention.varying import vary_over
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import Run
from ring_attention.parallel.mesh import AXES, DATA, FSDP, SEQUENCE, TENSOR

CACHE_SPEC = PartitionSpec(None, (DATA, FSDP), TENSOR, SEQUENCE)
"""PartitionSpec of each array [L,B,K,S,D]; fsdp is one device."""


class KeyValueCache(NamedTuple):
    """The share of the cache that a device holds.

    Attributes:
      k, v: [L,b,k,s,D] in the compute dtype, as bits where it is half precision (`as_bits`).
    """

    k: jax.Array
    v: jax.Array

    @staticmethod
    def empty(model: ModelConfig, run: Run, rows: int, slots: int) -> "KeyValueCache":
        """Return an empty cache of the layers of a run, for so many rows and slots of this device.

        For use inside a `shard_map` over the whole mesh.
        """
        shape = (len(run.numbers), rows, model.num_kv_heads // lax.axis_size(TENSOR), slots, cached_dim(model))
        zeros = vary_over(jnp.zeros(shape, cache_dtype(model)), frozenset(AXES))
        return KeyValueCache(zeros, zeros)

    def with_prompt(self, layer: jax.Array, k_btkD: jax.Array, v_btkD: jax.Array) -> "KeyValueCache":
        """Return a cache with this device's stripe of each row's prompt, padding too, in a layer's first slots."""
        at, new = (layer, 0, 0, 0, 0), (as_bits(jnp.swapaxes(x, 1, 2))[None] for x in (k_btkD, v_btkD))
        return KeyValueCache(*(lax.dynamic_update_slice(x, part, at) for x, part in zip(self, new, strict=True)))

    def with_token(self, layer: jax.Array, k_bkD: jax.Array, v_bkD: jax.Array, positions_b) -> "KeyValueCache":
        """Return a cache with one more token in each row, at its own position, on the device of that position."""
        P, (_, b, k, s, _) = lax.axis_size(SEQUENCE), self.k.shape
        mine = positions_b % P == lax.axis_index(SEQUENCE)
        slots = jnp.where(mine, positions_b // P, s)  # past the end: dropped
        new = (as_bits(k_bkD), as_bits(v_bkD))
        at = (layer, jnp.arange(b)[:, None], jnp.arange(k), slots[:, None])  # each head by itself: slots stay last
        return KeyValueCache(*(x.at[at].set(part, mode="drop") for x, part in zip(self, new, strict=True)))


def cached_dim(model: ModelConfig) -> int:
    """Return the width of a head's keys and values in the cache: the shorter of the two is padded."""
    return max(model.head_dim, model.value_dim)


def cache_dtype(model: ModelConfig) -> jnp.dtype:
    """Return the dtype in which keys and values are stored."""
    return jax.eval_shape(as_bits, jax.ShapeDtypeStruct((), model.compute_dtype)).dtype


def cache_bytes(model: ModelConfig, rows: int, slots: int, tensor: int) -> int:
    """Return the bytes of a device's share: 2 * L * b * s * K/tp * D numbers in the compute dtype."""
    numbers = 2 * model.num_layers * rows * slots * model.num_kv_heads // tensor * cached_dim(model)
    return numbers * cache_dtype(model).itemsize
