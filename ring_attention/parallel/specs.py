"""PartitionSpecs of attention's global arrays: which mesh axes shard batch, tokens and heads."""

from jax.sharding import Mesh, PartitionSpec

from ring_attention.checks import require, require_divisible
from ring_attention.parallel.mesh import DATA, FSDP, TENSOR


def axes_of_spec(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Mesh axes that each of the four axes of q is sharded over."""
    entries = [*spec, None, None, None, None][:4]
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries]


def default_spec(mesh: Mesh, axis_name: str) -> PartitionSpec:
    """B over dp and fsdp, T over `axis_name`, heads over tp; of the axes that the mesh has."""
    batch = tuple(axis for axis in (DATA, FSDP) if axis in mesh.shape)
    return PartitionSpec(batch or None, axis_name, TENSOR if TENSOR in mesh.shape else None, None)


def check_spec(spec: PartitionSpec, mesh: Mesh, axis_name: str, q, k) -> None:
    """Raise ValueError unless q and k can be sharded so, and so that each device has whole heads of some tokens."""
    require(
        isinstance(spec, PartitionSpec)
        and len(spec) >= 2
        and spec[1] == axis_name
        and (len(spec) < 4 or spec[3] is None),
        f"spec={spec} must shard axis 1 (tokens) over {axis_name!r} alone and leave axis 3 (head_dim) whole; "
        f"for example {default_spec(mesh, axis_name)}",
    )
    for axis, names in ((0, "batch"), (2, "heads")):
        axes, shards = axes_of_spec(spec)[axis], 1
        for name in axes:
            require(
                name in mesh.shape,
                f"spec={spec} names {name!r}, but the mesh has {dict(mesh.shape)}; drop it from spec",
            )
            shards *= mesh.shape[name]
        for array_name, array in (("q", q), ("k", k)):
            label = f"{names} of {array_name}"
            require_divisible(
                label, array.shape[axis], "x".join(axes) or "1", shards, "use fewer devices on these axes"
            )
