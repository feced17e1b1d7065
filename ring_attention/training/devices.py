"""The devices that a command runs on: those that are there or, where there are no accelerators, simulated ones."""

import dataclasses
import math

from jax.sharding import Mesh

from ring_attention.checks import ConfigError
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.training.config import MeshConfig

SIMULATED_DEVICES = 8


def open_mesh(config: MeshConfig, num_processes: int = 1) -> Mesh:
    """The mesh over all accelerators or, where there are none, over as many simulated devices as it needs."""
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    count = fixed
    if -1 in sizes.values():
        least = math.lcm(fixed, num_processes)
        count = least * max(1, SIMULATED_DEVICES // least)
    try:
        simulate_devices(max(1, count // num_processes))
        return make_mesh(**sizes)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{error} (--config.mesh.sp=-1 takes all that are left)") from error
