"""Arrays in the memory of the host: brought to the device to be computed with, and taken back, layer by layer.

JAX knows in which memory an array lies, so the same program serves arrays of a device and of its host.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from ring_attention.checks import ConfigError

PINNED_HOST = "pinned_host"
"""The memory kind of JAX for the host's memory that a device can read and write."""


def on_host(sharding: NamedSharding) -> NamedSharding:
    """Return the same sharding, in the memory of the devices' host.

    Raises:
      ConfigError: if the devices cannot reach a pinned memory of their host.
    """
    try:
        moved = sharding.with_memory_kind(PINNED_HOST)
    except ValueError as error:
        kind = next(iter(sharding.device_set)).device_kind
        raise ConfigError(
            f"optimizer.offload: {kind} has no memory of the kind {PINNED_HOST!r} ({error}); use optimizer.offload=none"
        ) from error
    if moved.memory_kind == PINNED_HOST:
        return moved
    # GPUs that are only compiled for cannot say which memories they have, and JAX then drops the kind.
    return NamedSharding(sharding.mesh.abstract_mesh, sharding.spec, memory_kind=PINNED_HOST)


def on_device(tree: Any) -> Any:
    """Return the arrays in the device's memory; those that lie there are returned as they are."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x, tree)


def update_layers(fn: Callable[[Any, Any], Any], written: Any, read: Any) -> Any:
    """Return `written` with each layer replaced by `fn` of that layer of both, in the place of what was there.

    The loop has one layer at a time on the device, whichever memory the arrays lie in.

    Args:
      fn: called as fn(written, read), whose arrays have a first axis of 1; returns arrays as those of `written`.
      written: pytree of arrays with a first axis of layers.
      read: another, which may be of another structure.
    """

    def update(layer, written):
        def one(whole):
            return on_device(lax.dynamic_slice_in_dim(whole, layer, 1))

        new = fn(jax.tree.map(one, written), jax.tree.map(one, read))
        return jax.tree.map(lambda whole, part: _put(whole, part, layer), written, new)

    return lax.fori_loop(0, _layers(written), update, written)


def fold_layers(fn: Callable[[Any, Any], Any], initial: Any, read: Any) -> Any:
    """Return `fn(... fn(initial, layer 0) ..., layer L-1)`, with one layer of `read` at a time on the device.

    Args:
      fn: called as fn(carry, read), whose arrays have a first axis of 1.
      initial: the first carry.
      read: pytree of arrays with a first axis of layers.
    """

    def add(layer, carry):
        return fn(carry, jax.tree.map(lambda whole: on_device(lax.dynamic_slice_in_dim(whole, layer, 1)), read))

    return lax.fori_loop(0, _layers(read), add, initial)


def _put(whole: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
    part = jax.device_put(part, jax.memory.Space.Host) if _on_host(whole) else part
    return lax.dynamic_update_slice_in_dim(whole, part, layer, 0)


def _layers(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _on_host(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
