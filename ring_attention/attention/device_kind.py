"""What kind of devices a computation is for, as far as that is known when it is traced."""

from typing import NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, get_abstract_mesh


class DeviceKind(NamedTuple):
    """One kind of device; both fields are None where it is not known.

    Attributes:
      platform: as `jax.Device.platform` has it, such as "tpu", "gpu" or "cpu".
      name: as `jax.Device.device_kind` has it, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """

    platform: str | None
    name: str | None

    @property
    def is_amd(self) -> bool:
        """Whether this is a GPU that ROCm drives, whose platform JAX calls "gpu" as well."""
        return self.platform == "gpu" and any(word in (self.name or "") for word in ("AMD", "Instinct", "gfx"))

    def __str__(self) -> str:
        """The name of the device, or of its platform."""
        return self.name or self.platform or "unknown devices"


def kind_of_mesh(mesh: Mesh | AbstractMesh) -> DeviceKind:
    """The kind of a mesh's first device; unknown for an abstract mesh that does not say."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    return _kind_of(device)


def kind_here(array=None) -> DeviceKind:
    """The kind of the devices that a call is for, as its surroundings tell.

    The device of `array` tells first, where that is a concrete array; then the mesh that is set or that a `shard_map`
    goes over, which may say that nothing is known; then `jax_default_device`; then the default backend, which this
    starts if nothing else has.
    """
    if isinstance(array, jax.Array) and not isinstance(array, Tracer):
        return _kind_of(next(iter(array.devices())))
    mesh = get_abstract_mesh()
    if not mesh.empty:
        return kind_of_mesh(mesh)
    default = jax.config.values.get("jax_default_device")
    if isinstance(default, str):
        return _kind_of(jax.local_devices(backend=default)[0])
    return _kind_of(default or jax.local_devices()[0])


def _kind_of(device) -> DeviceKind:
    return DeviceKind(getattr(device, "platform", None), getattr(device, "device_kind", None))
