"""Work that is written for one device, over global arrays of a mesh with axes of any type.

Inside, all axes that no shard_map goes over are Auto and one `shard_map` goes over them all; outside, what comes out
has the type that its surroundings ask for.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from ring_attention.attention.axis_types import auto_axes, auto_mesh, explicit_part, mesh_of, names_of
from ring_attention.parallel.mapped import mapped_axes, over_mapped


def on_mesh(mesh: Mesh | AbstractMesh, spec: PartitionSpec, work: Callable) -> Callable:
    """`jit` of `work(shard_map, *arrays)`, whose results are sharded like `spec`, with types like its first array's.

    `work` gets a `shard_map(fn, in_specs, out_specs)` over the mesh, and arrays whose axes are Auto.
    """
    inner = auto_mesh(mesh)
    axes = frozenset(inner.axis_names) - frozenset(inner.manual_axes)

    def shard_map(fn, in_specs, out_specs):
        over = functools.partial(jax.shard_map, mesh=inner, axis_names=axes)
        mapped = mapped_axes(inner)
        if mapped:
            over = over_mapped(over, {name: inner.shape[name] for name in mapped})
        if mapped or inner.manual_axes:
            return _nested(over, fn, in_specs, out_specs)
        return over(fn, in_specs=in_specs, out_specs=out_specs)

    def run(first, *others):
        with auto_axes(inner, (first, *others)) as arrays:
            results = work(shard_map, *arrays)
        return jax.tree.map(lambda out: _typed(out, spec, mesh, first), results)

    return jax.jit(run)


def _nested(over: Callable, fn: Callable, in_specs: tuple, out_specs) -> Callable:
    """`fn` over shards inside another shard_map, with a gradient that is taken on each device, forward pass included.

    JAX (0.10 to 0.12) cuts what its own gradient keeps by the outer axes once more, and then cannot lower it. Nor can
    it take gradients of what says itself how it is mapped (`over_mapped`).
    """
    call = jax.custom_vjp(over(fn, in_specs=in_specs, out_specs=out_specs))

    def backward(args, cotangents):
        cotangents, tree = jax.tree.flatten(cotangents)
        number = len(cotangents)
        moving = [i for i, x in enumerate(args) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]

        def on_shards(*arrays):
            cotangents, args = tree.unflatten(arrays[:number]), arrays[number:]

            def of(*chosen):
                return fn(*(chosen[moving.index(i)] if i in moving else x for i, x in enumerate(args)))

            return jax.vjp(of, *(args[i] for i in moving))[1](cotangents)

        specs = tuple(in_specs[i] for i in moving)
        of_results = jax.tree.leaves(out_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
        grads = over(on_shards, in_specs=(*of_results, *in_specs), out_specs=specs)(*cotangents, *args)
        return tuple(grads[moving.index(i)] if i in moving else None for i in range(len(args)))

    call.defvjp(lambda *args: (call(*args), args), backward)
    return call


def _typed(out: jax.Array, spec: PartitionSpec, mesh: Mesh | AbstractMesh, first: jax.Array) -> jax.Array:
    """`out` as its surroundings see it: with the types of the mesh that is set, or of `first` where none is."""
    here = get_abstract_mesh()
    around = mesh_of(first) if here.empty else here
    if around.empty or around == mesh_of(out):
        return out
    if around.shape != mesh.shape:  # another mesh: the types of the first array are all that is known of it
        known = jax.typeof(first).sharding
        return jax.sharding.reshard(out, known.update(mesh=around, spec=PartitionSpec(*known.spec[: out.ndim])))
    spec = explicit_part(spec, around)
    entries = zip(spec, out.shape, strict=False)
    spec = PartitionSpec(*(entry if _divides(entry, size, mesh) else None for entry, size in entries))
    target = mesh if isinstance(mesh, Mesh) and mesh.abstract_mesh == around else around
    return jax.sharding.reshard(out, NamedSharding(target, spec))


def _divides(entry, size: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether a type can say so: where the devices do not divide an axis it has none."""
    return size % math.prod(mesh.shape[name] for name in names_of(entry)) == 0
