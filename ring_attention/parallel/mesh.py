"""The device mesh and the names of its axes."""

import math
from collections.abc import Iterable, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, get_abstract_mesh

from ring_attention.checks import is_whole, require, shown
from ring_attention.parallel.wires import arrange

DATA, FSDP, SEQUENCE, TENSOR = "dp", "fsdp", "sp", "tp"
AXES = (DATA, FSDP, SEQUENCE, TENSOR)


def make_mesh(
    dp: int = 1, fsdp: int = 1, sp: int = -1, tp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes dp, fsdp, sp and tp, whose rings along sp lie on the wires (see `wires.arrange`).

    On a TPU pod every hop of a ring is one link wherever the grid has such a ring. Devices without coordinates stay in
    order, tp varying fastest, those of a host together.

    Args:
      dp: devices along the data axis, over which parameters are replicated.
      fsdp: devices along the data axis over which parameters are sharded.
      sp: devices of a ring, over which the sequence is sharded.
      tp: devices over which heads, feed-forward and vocabulary are sharded.
      devices: all of jax.devices() by default, which chooses the backend.

    One of the sizes may be -1: it takes the devices that the others leave.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fits = isinstance(devices, Iterable) and all(hasattr(device, "platform") for device in devices)
    require(fits, f"devices={shown(devices)} must be a list of JAX's devices; give jax.devices() or some of them")
    shape = resolve_mesh_shape(dict(dp=dp, fsdp=fsdp, sp=sp, tp=tp), len(devices))
    sizes = shape[DATA], shape[FSDP], shape[SEQUENCE], shape[TENSOR]
    return Mesh(arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def find_mesh(mesh: Mesh | AbstractMesh | None, axis_name: str) -> Mesh | AbstractMesh:
    """The mesh to compute on: the one given, or the one set, by `jax.set_mesh` or by a shard_map around the call.

    A mesh that differs from the one set in nothing but the types of its axes, and in axes of one device, is that one:
    JAX takes no other in its place, and types and Manual axes are those of the call's surroundings.

    Raises:
      ValueError: where none is given and none set, for what is no mesh, and for one that has no such axis.
    """
    here = get_abstract_mesh()
    if mesh is None:
        require(not here.empty, "mesh is left out, but none is set; give mesh=make_mesh(sp=...), or jax.set_mesh(mesh)")
        mesh = here
    is_mesh = isinstance(mesh, Mesh | AbstractMesh)
    require(is_mesh, f"mesh={shown(mesh)} is no jax.sharding.Mesh; make one with make_mesh(sp=...)")
    has = f"is not an axis of the mesh, which has {dict(mesh.shape)}"
    known = isinstance(axis_name, str) and axis_name in mesh.shape
    require(known, f"axis_name={shown(axis_name)} {has}; name one of these")
    if axis_name in here.shape and _large_axes(mesh) == _large_axes(here):
        mesh = here
    require(
        here.empty or mesh.size == here.size,
        f"mesh has {mesh.size} devices, but the one set by jax.set_mesh has {here.size}; leave mesh= out to take that",
    )
    require(
        axis_name not in mesh.manual_axes,
        f"axis_name={axis_name!r} is an axis that the shard_map around this call goes over already; "
        "call context_attention_shard, or decode_attention_shard, there",
    )
    return mesh


def _large_axes(mesh: Mesh | AbstractMesh) -> list[tuple[str, int]]:
    return [(name, size) for name, size in mesh.shape.items() if size > 1]


def compiler_options(mesh: Mesh) -> dict[str, int]:
    """What to tell XLA about programs with rings on these devices (`compiler_options=` of `jax.jit`).

    For GPU it keeps one transfer in flight at a time, so K and V must go in one, however large they are.
    """
    gpu = mesh.devices.flat[0].platform == "gpu"
    return {"xla_gpu_collective_permute_combine_threshold_bytes": 2**40} if gpu else {}


def resolve_mesh_shape(shape: dict[str, int], num_devices: int) -> dict[str, int]:
    """`shape` with its -1, if any, replaced by what `num_devices` leaves for it."""
    words = ", ".join(f"{name}={shown(size)}" for name, size in shape.items())
    require(
        all(is_whole(size, 1) or size == -1 for size in shape.values()) and list(shape.values()).count(-1) < 2,
        f"mesh has {words}, need whole positive sizes, or -1 once; use 1 to leave an axis out",
    )
    require(num_devices > 0, f"mesh {words} has got 0 devices, need at least 1; leave devices= out to take all")
    fixed = math.prod(size for size in shape.values() if size != -1)
    free = -1 in shape.values()
    fits = num_devices % fixed == 0 if free else num_devices == fixed
    need = f"a multiple of {fixed}" if free else f"exactly {fixed}"
    require(fits, f"mesh {words} needs {need} devices, got {num_devices}; change the sizes or pass devices=")
    return {name: num_devices // fixed if size == -1 else size for name, size in shape.items()}
