"""The one table that says where every axis of every array lives, and how a weight gets from there to its use.

The model is written per device: it runs inside a `shard_map` over the whole mesh and sees its slice of everything. So
each collective of a training step is written down, in `ring` (blocks of keys and values), here (weights and their
gradients) or as a sum over the tensor axis where a row-parallel product ends.
"""

import functools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(w: jax.Array, axes: tuple[str, ...], dtype: jnp.dtype) -> jax.Array:
    """A weight as its user needs it: whole along "model", still sharded over tp, in `dtype`, free to meet any token.

    Call it outside loops over tokens, so that their gradients are summed on each device first. It is cast before it
    travels; its gradient travels, and is summed, in float32, straight to the shard that owns it.

    Args:
      w: this device's shard of a parameter.
      axes: its logical axes.
      dtype: of the result.
    """
    return _gathered(w, axes, dtype)


@jax.named_scope("weights")
def _gathered(w, axes, dtype):
    # Undecorated: what a forward rule computes must let tangents through, for Hessians.
    w = w.astype(dtype)
    if "model" in axes:
        w = lax.all_gather(w, RULES["model"], axis=axes.index("model"), tiled=True)
    return vary_over(w, frozenset(TOKEN_AXES))


def _gather_forward(w, axes, dtype):
    return _gathered(w, axes, dtype), jnp.zeros((0,), w.dtype)


@jax.named_scope("weights")
def _gather_backward(axes, dtype, like, grad):
    del dtype
    grad = grad.astype(jnp.float32)
    if "model" in axes:
        grad = lax.psum_scatter(grad, RULES["model"], scatter_dimension=axes.index("model"), tiled=True)
        summed = RULES["model"]
    else:
        summed = ()
    rest = tuple(axis for axis in TOKEN_AXES if axis not in summed and axis in axes_of(grad))
    return (lax.psum(grad, rest).astype(like.dtype),)


gather_weight.defvjp(_gather_forward, _gather_backward)
