"""The cache of keys and values: of the layers of a run, its slots dealt to the devices of a ring like stripes.

Position p of a row lies on device p % P in slot p // P. So rows of any length fill the devices evenly, a prompt that
was prefilled in the striped layout lies in the first slots of each, and so does a token that is appended later.

Where a layer's tokens see a window or chunk, a device keeps so many slots as that needs, and writes them in a circle:
the slot is then the remainder of p // P by the number of slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ring_attention.attention.cached import as_bits
from ring_attention.attention.varying import vary_over
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind, Run
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
    def empty(model: ModelConfig, run: Run, rows: int, capacity: int) -> "KeyValueCache":
        """Return an empty cache of the layers of a run, for so many rows of this device.

        For use inside a `shard_map` over the whole mesh.
        """
        slots, heads = slots_of(run.kind, capacity, lax.axis_size(SEQUENCE)), model.num_kv_heads
        shape = (run.count, rows, heads // lax.axis_size(TENSOR), slots, cached_dim(model))
        zeros = vary_over(jnp.zeros(shape, cache_dtype(model)), frozenset(AXES))
        return KeyValueCache(zeros, zeros)

    def with_prompt(self, layer: jax.Array, k_btkD: jax.Array, v_btkD: jax.Array) -> "KeyValueCache":
        """Return a cache with this device's stripe of each row's prompt, padding too, in a layer's first slots."""
        at, new = (layer, 0, 0, 0, 0), (as_bits(jnp.swapaxes(x, 1, 2))[None] for x in (k_btkD, v_btkD))
        return KeyValueCache(*(lax.dynamic_update_slice(x, part, at) for x, part in zip(self, new, strict=True)))

    def with_tokens(
        self, layer: jax.Array, k_btkD: jax.Array, v_btkD: jax.Array, positions_bt, ends_b, *, circle: bool
    ) -> "KeyValueCache":
        """Return a cache with more tokens in each row, each on the device of its position.

        Args:
          layer: int32, its place in the run.
          k_btkD, v_btkD: of tokens in the order of their positions.
          positions_bt: int32.
          ends_b: int32, the position after each row's last token; those from there on are padding.
          circle: whether the slots are written in a circle; a row's newest tokens stay.
        """
        P, (_, b, k, s, _) = lax.axis_size(SEQUENCE), self.k.shape
        keep = (positions_bt % P == lax.axis_index(SEQUENCE)) & (positions_bt < ends_b[:, None])
        slots = positions_bt // P
        if circle:
            newest = jnp.minimum(ends_b, positions_bt[:, -1] + P)[:, None]  # after what is written now, at the most
            keep &= positions_bt >= newest - s * P
            slots %= s
        slots = jnp.where(keep, slots, s)[:, None]  # past the end: dropped
        rows, heads = jnp.arange(b)[:, None, None], jnp.arange(k)[:, None]
        at = (layer, rows, heads, slots)  # heads one by one, so that slots stay last
        new = (as_bits(jnp.swapaxes(x, 1, 2)) for x in (k_btkD, v_btkD))
        return KeyValueCache(*(x.at[at].set(part, mode="drop") for x, part in zip(self, new, strict=True)))

    def positions(self, lengths_b: jax.Array) -> jax.Array:
        """Return the positions of the tokens in this device's slots, int32 [b,s], -1 where there is none.

        `lengths_b` are the tokens that each row has had, of which a circle holds the newest.
        """
        P, s = lax.axis_size(SEQUENCE), self.k.shape[3]
        me, slots = lax.axis_index(SEQUENCE), jnp.arange(s, dtype=jnp.int32)[None]
        newest = (lengths_b.astype(jnp.int32)[:, None] - 1 - me) // P  # the stripe of this device's newest token, or -1
        stripes = slots + s * ((newest - slots) // s)
        return jnp.where(stripes < 0, -1, stripes * P + me)


def is_circle(kind: LayerKind, capacity: int) -> bool:
    """Return whether layers of this kind keep fewer tokens than the capacity."""
    return kind.reach is not None and kind.reach < capacity


def slots_of(kind: LayerKind, capacity: int, devices: int) -> int:
    """Return how many tokens of a row each of the devices of a ring keeps for layers of this kind."""
    return -(-min(kind.reach or capacity, capacity) // devices)


def cached_dim(model: ModelConfig) -> int:
    """Return the width of a head's keys and values in the cache: the shorter of the two is padded."""
    return max(model.head_dim, model.value_dim)


def cache_dtype(model: ModelConfig) -> jnp.dtype:
    """Return the dtype in which keys and values are stored."""
    return jax.eval_shape(as_bits, jax.ShapeDtypeStruct((), model.compute_dtype)).dtype


def cache_bytes(model: ModelConfig, run: Run, rows: int, capacity: int, devices: int, tensor: int) -> int:
    """Return the bytes of a device's share: 2 * b * s * K/tp * D numbers in the compute dtype, of each layer of a run.

    Args:
      model: its shape.
      run: of layers of one kind, that says how far its tokens see.
      rows: b, of the device.
      capacity: tokens of a row, shared by so many `devices` of a ring.
      devices: of a ring.
      tensor: devices that share the heads.
    """
    slots = run.count * slots_of(run.kind, capacity, devices)
    return 2 * rows * slots * model.num_kv_heads // tensor * cached_dim(model) * cache_dtype(model).itemsize
