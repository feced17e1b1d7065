"""Meshes whose axes are Explicit: there an array's type says how it is sharded, and every operation must keep to it.

Loops over tiles and gathers by position have no such types. Where one starts, Explicit axes become Auto ones, whose
shardings XLA works out, and what comes out of it gets its type again.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh


def auto_mesh(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The mesh with Auto axes in place of Explicit ones; axes that a shard_map goes over stay Manual."""
    if not mesh.explicit_axes:
        return mesh
    types = tuple(AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types)
    return mesh.update(axis_types=types)


def type_of(x, others=()) -> NamedSharding | None:
    """The sharding in the type of `x`; None where neither it, nor `others`, nor the mesh set has Explicit axes."""
    meshes = [mesh for mesh in (mesh_of(y) for y in (x, *jax.tree.leaves(others))) if mesh.explicit_axes]
    if not meshes and not get_abstract_mesh().explicit_axes:
        return None
    own = jax.typeof(x).sharding
    return own if own.mesh.explicit_axes else NamedSharding((meshes or [get_abstract_mesh()])[0], PartitionSpec())


def mesh_of(x) -> AbstractMesh:
    """The mesh in the type of `x`, empty where it has none."""
    return jax.typeof(x).sharding.mesh


@contextlib.contextmanager
def auto_axes(mesh: Mesh | AbstractMesh, tree):
    """A context in which `mesh`, which has no Explicit axes, is the one that JAX goes by; gives `tree` as arrays there.

    Where nothing else is set, and no array has a type of another mesh, it changes nothing.
    """
    mesh_here = mesh.abstract_mesh
    around = {get_abstract_mesh(), *map(mesh_of, jax.tree.leaves(tree))}
    if all(other.empty or other == mesh_here for other in around):
        yield tree
        return
    sharding = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh_here):
        yield jax.tree.map(
            lambda x: x if mesh_of(x).empty or mesh_of(x) == mesh_here else jax.sharding.reshard(x, sharding), tree
        )


def explicit_part(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The part of a spec that types of this mesh tell."""
    explicit = mesh.explicit_axes
    return PartitionSpec(*(tuple(name for name in names_of(entry) if name in explicit) or None for entry in spec))


def names_of(entry) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def with_auto_axes(fn: Callable, static, args: tuple, like: NamedSharding | None) -> Any:
    """`fn(static, *args)`, inside which Explicit axes are Auto.

    Args:
      fn: a function with a name of its own, so that programs are found again.
      static: hashable.
      args: trees of arrays.
      like: the type that leading axes of the results get; None where there is nothing to do but to call `fn`.
    """
    return fn(static, *args) if like is None else _with_auto_axes(fn, static, args, like)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _with_auto_axes(fn: Callable, static, args: tuple, like: NamedSharding):
    inner = auto_mesh(like.mesh)
    with auto_axes(inner, args) as args:
        results = fn(static, *args)
    return jax.tree.map(
        lambda x: jax.sharding.reshard(x, NamedSharding(like.mesh, PartitionSpec(*like.spec[: x.ndim]))), results
    )
