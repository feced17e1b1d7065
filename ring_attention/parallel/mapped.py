"""`jax.vmap(..., spmd_axis_name=)` around a call: the axis that it maps is sharded over axes of the mesh."""

import math
from collections.abc import Callable

import jax
from jax._src import core  # what a vmap around a call shards has no public name
from jax.custom_batching import custom_vmap
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ring_attention.attention.varying import vary_over
from ring_attention.checks import require_divisible


def mapped_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Axes of `mesh` that the `spmd_axis_name`s of vmaps around this call name, but those of a shard_map around it."""
    names = core.get_axis_env().spmd_axis_names
    return tuple(name for name in mesh.axis_names if name in names and name not in mesh.manual_axes)


def over_mapped(over: Callable, axes: dict[str, int]) -> Callable:
    """`over`, a shard_map but for its function and specs, where a vmap around it shards what it maps over `axes`.

    JAX 0.10 batches the program of each device after its types are settled, and finds then that some arrays vary over
    the new axes and others do not. So the program that each device maps is traced anew, inside a shard_map that knows
    all axes. It has no gradient of its own.
    """
    names = tuple(axes)

    def of(fn, in_specs, out_specs):
        call = custom_vmap(_sharding_nothing(over(fn, in_specs=in_specs, out_specs=out_specs)))

        @call.def_vmap
        def call_mapped(size: int, mapped: list, *arrays):
            by, remedy = "x".join(names), "pad what is mapped, or leave spmd_axis_name out"
            require_divisible("what jax.vmap maps", size, by, math.prod(axes.values()), remedy)
            where = [0 if is_mapped else None for is_mapped in mapped]

            def on_shards(*arrays):
                return jax.vmap(fn, in_axes=where)(*vary_over(arrays, frozenset(names)))

            specs = zip(in_specs, mapped, strict=True)
            specs = tuple(PartitionSpec(names, *spec) if is_mapped else spec for spec, is_mapped in specs)
            is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
            outs = jax.tree.map(lambda spec: PartitionSpec(names, *spec), out_specs, is_leaf=is_spec)
            out = _sharding_nothing(over(on_shards, in_specs=specs, out_specs=outs))(*arrays)
            return out, jax.tree.map(lambda _: True, out)

        return call

    return of


def _sharding_nothing(fn: Callable) -> Callable:
    """`fn` traced as if no vmap around it had an `spmd_axis_name`.

    Else JAX 0.10 types what any vmap inside a device's program broadcasts as varying over these axes, too.
    """

    def call(*arrays):
        context = core.trace_ctx
        env = context.axis_env
        context.set_axis_env(core.AxisEnv(env.axis_sizes, frozenset(), env.explicit_mesh_axis_names))
        try:
            return fn(*arrays)
        finally:
            context.set_axis_env(env)

    return call
