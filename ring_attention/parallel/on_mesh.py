"""Work that is written for one device, over global arrays of a mesh with axes of any type.

Inside, all axes that no shard_map goes over are Auto and one `shard_map` goes over them all; outside, what comes out
has the type that its surroundings ask for.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from ring_attention.attention.axis_types import auto_axes, auto_mesh, explicit_part, mesh_of, names_of


def on_mesh(mesh: Mesh | AbstractMesh, spec: PartitionSpec, work: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`jit` of `work(shard_map, *arrays)`, whose result is sharded like `spec` and has a type like its first array's.

    `work` gets a `shard_map(fn, in_specs, out_specs)` over the mesh, and arrays whose axes are Auto.
    """
    inner = auto_mesh(mesh)
    axes = frozenset(inner.axis_names) - frozenset(inner.manual_axes)

    def shard_map(fn, in_specs, out_specs):
        return jax.shard_map(fn, mesh=inner, in_specs=in_specs, out_specs=out_specs, axis_names=axes)

    def run(first, *others):
        with auto_axes(inner, (first, *others)) as arrays:
            out = work(shard_map, *arrays)
        return _typed(out, spec, mesh, first)

    return jax.jit(run)


def _typed(out: jax.Array, spec: PartitionSpec, mesh: Mesh | AbstractMesh, first: jax.Array) -> jax.Array:
    """`out` as its surroundings see it: with the types of the mesh that is set, or of `first` where none is."""
    here = get_abstract_mesh()
    around = mesh_of(first) if here.empty else here
    if around.empty or around == mesh_of(out):
        return out
    if around.shape != mesh.shape:  # another mesh: the types of the first array are all that is known of it
        return jax.sharding.reshard(out, jax.typeof(first).sharding.update(mesh=around))
    spec = explicit_part(spec, around)
    entries = zip(spec, out.shape, strict=False)
    spec = PartitionSpec(*(entry if _divides(entry, size, mesh) else None for entry, size in entries))
    target = mesh if isinstance(mesh, Mesh) and mesh.abstract_mesh == around else around
    return jax.sharding.reshard(out, NamedSharding(target, spec))


def _divides(entry, size: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether a type can say so: where the devices do not divide an axis it has none."""
    return size % math.prod(mesh.shape[name] for name in names_of(entry)) == 0
