"""The one table that says where every axis of every array lives, and how a weight gets from there to its use.

The model is written per device: it runs inside a `shard_map` over the whole mesh and sees its slice of everything. So
each collective of a training step is written down, in `ring` (blocks of keys and values), here (weights and their
gradients) or as a sum over the tensor axis where a row-parallel product ends.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.checks import require, require_divisible
from ring_attention.parallel.mesh import DATA, FSDP, SEQUENCE, TENSOR

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": (DATA, FSDP),
    "sequence": (SEQUENCE,),
    # parameters
    "model": (
        FSDP,
        SEQUENCE,
    ),  # a ring's devices would otherwise each hold all parameters; gathered where they are used
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "ffn": (TENSOR,),
    "vocab": (TENSOR,),
    "layers": (),
    "head_dim": (),
    "norm": (),
}

TOKEN_AXES = (DATA, FSDP, SEQUENCE)
"""Mesh axes along which devices hold different tokens: sums over tokens, and so gradients of weights, cross them."""


def spec_of(axes: tuple[str, ...]) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes; two of them on one mesh axis is an error."""
    entries = [RULES[axis] for axis in axes]
    used = [name for entry in entries for name in entry]
    require(len(used) == len(set(used)), f"logical axes {axes} use a mesh axis twice: {used}; change the table RULES")
    return PartitionSpec(*(entry or None for entry in entries))


def check_fits(name: str, size: int, axis: str, mesh_shape: dict[str, int]) -> None:
    """Raise ValueError unless the mesh divides an array axis called `name`, of `size`, with the logical axis `axis`."""
    names = RULES[axis]
    shards = 1
    for mesh_axis in names:
        shards *= mesh_shape[mesh_axis]
    need = -(-size // shards) * shards
    require_divisible(name, size, "*".join(names), shards, f"use {need} or fewer devices on these axes of the mesh")


def stored_shape(shape: tuple[int, ...], spec: PartitionSpec, mesh_shape: Mapping[str, int]) -> tuple[int, ...]:
    """Shape in which an array of `shape` is kept on a mesh: zeros pad each axis to equal parts for those who share it.

    Args:
      shape: of the array itself.
      spec: of `spec_of`.
      mesh_shape: sizes of the mesh axes.
    """
    names = [(entry,) if isinstance(entry, str) else entry or () for entry in (*spec, *[None] * len(shape))]
    parts = [math.prod(mesh_shape[name] for name in entry) for entry in names]
    return tuple(-(-size // part) * part for size, part in zip(shape, parts, strict=False))


def resized(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Cut each axis of `x` at its end, or pad it there with zeros, to a `shape` of as many axes."""
    if x.shape == shape:
        return x
    x = x[tuple(slice(size) for size in shape)]
    return jnp.pad(x, [(0, size - has) for size, has in zip(shape, x.shape, strict=True)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(w: jax.Array, axes: tuple[str, ...], dtype: jnp.dtype, width: int | None = None) -> jax.Array:
    """A weight as its user needs it: whole along "model", still sharded over tp, in `dtype`, free to meet any token.

    Call it outside loops over tokens, so that their gradients are summed on each device first. It is cast before it
    travels; its gradient travels, and is summed, in float32, straight to the shard that owns it. Where a shard is typed
    as varying over dp its gradient is, too, and left to be summed there by the caller.

    Args:
      w: this device's shard of a parameter.
      axes: its logical axes.
      dtype: of the result.
      width: of the result along "model", where `stored_shape` may have padded it; None: as wide as all shards are.
    """
    return _gathered(w, axes, dtype, width)


@jax.named_scope("weights")
def _gathered(w, axes, dtype, width):
    # Undecorated: what a forward rule computes must let tangents through, for Hessians.
    w = w.astype(dtype)
    if "model" in axes:
        axis = axes.index("model")
        w = lax.all_gather(w, RULES["model"], axis=axis, tiled=True)
        w = resized(w, (*w.shape[:axis], width or w.shape[axis], *w.shape[axis + 1 :]))
    return vary_over(w, frozenset(TOKEN_AXES))


def _gather_forward(w, axes, dtype, width):
    return _gathered(w, axes, dtype, width), vary_over(jnp.zeros((0,), w.dtype), axes_of(w))


@jax.named_scope("weights")
def _gather_backward(axes, dtype, width, like, grad):
    del dtype, width
    grad = grad.astype(jnp.float32)
    if "model" in axes:
        axis, owners = axes.index("model"), lax.axis_size(RULES["model"])
        shape = tuple(-(-size // owners) * owners if axis == number else size for number, size in enumerate(grad.shape))
        grad = lax.psum_scatter(resized(grad, shape), RULES["model"], scatter_dimension=axis, tiled=True)
        summed = RULES["model"]
    else:
        summed = ()
    rest = tuple(axis for axis in TOKEN_AXES if axis not in summed and axis in axes_of(grad) - axes_of(like))
    return (lax.psum(grad, rest).astype(like.dtype),)


gather_weight.defvjp(_gather_forward, _gather_backward)
