"""PartitionSpecs of attention's global arrays: which mesh axes shard batch, tokens and heads."""

import math

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ring_attention.attention.axis_types import names_of
from ring_attention.checks import require, require_divisible
from ring_attention.parallel.mapped import mapped_axes
from ring_attention.parallel.mesh import DATA, FSDP, TENSOR


def axes_of_spec(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Mesh axes that each of the four axes of q is sharded over."""
    return [names_of(entry) for entry in [*spec, None, None, None, None][:4]]


def known_spec(x, mesh: Mesh | AbstractMesh) -> PartitionSpec | None:
    """How `x` is sharded over axes of `mesh`, where that is known now.

    Types tell it where all axes of the mesh are Explicit, concrete arrays that were put somewhere always. Inside `jit`
    the shardings of Auto axes are not known before the program is compiled.
    """
    typed = jax.typeof(x).sharding
    if typed.mesh.shape == mesh.shape and not typed.mesh.auto_axes:
        return typed.spec
    concrete = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if isinstance(concrete, NamedSharding) and concrete.mesh.shape == mesh.shape:
        return concrete.spec
    return None


def default_spec(mesh: Mesh | AbstractMesh, axis_name: str, known: PartitionSpec | None, sizes=None) -> PartitionSpec:
    """B and heads over the axes that shard them already, B over dp and fsdp, T over `axis_name`, heads over tp.

    Args:
      mesh: of its axes, those that a shard_map around goes over, or a vmap shards, are left out.
      axis_name: of the sequence.
      known: how the arrays are sharded, where that is known.
      sizes: (B, K), for the example in the message.

    Raises:
      ValueError: where the mesh has another axis of several devices and nobody says what it shards.
    """
    taken = {axis_name, *mesh.manual_axes, *mapped_axes(mesh)}
    free = [name for name in mesh.shape if name not in taken]
    batch, tokens, heads, features = axes_of_spec(known or PartitionSpec())
    batch, heads = ([name for name in names if name in free] for names in (batch, heads))
    batch += [name for name in (DATA, FSDP) if name in free and name not in batch + heads]
    heads += [name for name in (TENSOR,) if name in free and name not in batch + heads]
    settled = {DATA, FSDP, TENSOR, *batch, *heads}
    if known is not None:  # an axis that shards nothing holds copies already
        settled |= set(free) - {*tokens, *features}
    _require_settled(mesh, axis_name, [name for name in free if name not in settled and mesh.shape[name] > 1], sizes)
    return PartitionSpec(tuple(batch) or None, axis_name, _entry(heads), None)


def _require_settled(mesh, axis_name: str, unknown: list[str], sizes) -> None:
    """Raise ValueError if there are unknown axes, with the call that says what they shard."""
    if not unknown:
        return
    *most, last = unknown
    to_heads = bool(most) and (sizes is None or sizes[1] % mesh.shape[last] == 0)
    example = _by_name(mesh, axis_name, most if to_heads else unknown, [last] if to_heads else [])
    names = " and ".join(map(repr, unknown))
    require(
        False,
        f"the mesh has {dict(mesh.shape)}, and what {names} should shard is not known here; give spec=, for example "
        f"spec={_shown(example)}, or spec={_shown(PartitionSpec(None, axis_name, None, None))} to compute copies",
    )


def _by_name(mesh, axis_name: str, batch=(), heads=()) -> PartitionSpec:
    """B over dp, fsdp and the others named, T over `axis_name`, heads over tp and the others; of the axes there are."""
    batch = [*(name for name in (DATA, FSDP) if name in mesh.shape), *batch]
    heads = [*(name for name in (TENSOR,) if name in mesh.shape), *heads]
    return PartitionSpec(tuple(batch) or None, axis_name, _entry(heads), None)


def _entry(names: list[str]):
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def _shown(spec: PartitionSpec) -> str:
    return f"PartitionSpec({', '.join(map(repr, spec))})"


def spec_on(spec: PartitionSpec, given: Mesh | AbstractMesh | None, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec`, which was meant for the mesh `given`, without the axes of one device that `mesh` does not have."""
    if given is None or not isinstance(spec, PartitionSpec):
        return spec
    gone = [name for name, size in given.shape.items() if size == 1 and name not in mesh.shape]

    def of(entry):
        if entry in gone:
            return None
        return tuple(name for name in entry if name not in gone) or None if isinstance(entry, tuple) else entry

    return PartitionSpec(*map(of, spec)) if gone else spec


def check_spec(spec: PartitionSpec, mesh: Mesh | AbstractMesh, axis_name: str, q, k) -> None:
    """Raise ValueError unless q and k can be sharded so, and so that each device has whole heads of some tokens."""
    mapped = mapped_axes(mesh)
    require(
        axis_name not in mapped,
        f"axis_name={axis_name!r} is the spmd_axis_name of a jax.vmap around this call, need another axis of the mesh; "
        "shard what vmap maps over another one",
    )
    require(
        isinstance(spec, PartitionSpec)
        and len(spec) >= 2
        and len(spec) <= 4
        and spec[1] in (axis_name, (axis_name,))
        and (len(spec) < 4 or spec[3] is None),
        f"spec={spec} must shard axis 1 (tokens) over {axis_name!r} alone and leave axis 3 (head_dim) whole; "
        f"for example {_by_name(mesh, axis_name)}",
    )
    for axis, names in ((0, "batch"), (2, "heads")):
        axes, shards = axes_of_spec(spec)[axis], 1
        for name in axes:
            require(
                name in mesh.shape,
                f"spec={spec} names {name!r}, but the mesh has {dict(mesh.shape)}; drop it from spec",
            )
            require(
                name not in mesh.manual_axes,
                f"spec={spec} names {name!r}, which a shard_map around this call goes over already; drop it",
            )
            require(
                name not in mapped,
                f"spec={spec} names {name!r}, the spmd_axis_name of a jax.vmap around this call; drop it from one",
            )
            shards *= mesh.shape[name]
        for array_name, array in (("q", q), ("k", k)):
            label, remedy = f"{names} of {array_name}", "use fewer devices on these axes"
            if names == "heads" and array_name == "k":
                copies = shards // math.gcd(k.shape[2], shards)
                if q.shape[2] % (k.shape[2] * copies) == 0:
                    remedy = f"repeat each head of k and v {copies} times, jnp.repeat(k, {copies}, axis=2), or {remedy}"
            require_divisible(label, array.shape[axis], "x".join(axes) or "1", shards, remedy)
