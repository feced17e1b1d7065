"""Whether the devices have the memory that a run surely needs, asked before anything is allocated or compiled."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ring_attention.checks import ConfigError
from ring_attention.parallel.sharding import TOKEN_AXES
from ring_attention.training.config import TrainConfig
from ring_attention.training.step import sharded_abstract_state

_GIB = 2**30
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""What a container may have of the host's memory; what it uses of that is mostly files, which give way."""


def require_memory(config: TrainConfig, mesh: Mesh) -> None:
    """Raise ConfigError unless the memory that is free holds what a step holds at once, at the least.

    On CPU all simulated devices of this process share the host's memory. Where nobody says how much there is, nothing
    is refused. `scripts/plan.py` predicts all of what a step needs, for accelerators.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    on_host = devices[0].platform == "cpu"
    sharing = len(devices) if on_host else 1
    have = available_on_host() if on_host else _available_on(devices[0])
    state, activations = state_bytes(config, mesh), kept_bytes(config, mesh)
    need = sharing * (state + activations)
    if have is None or need <= have:
        return
    where = f"the host's memory, which {sharing} devices share," if on_host else f"each {devices[0].device_kind}"
    raise ConfigError(
        f"model: its {config.model.num_parameters:,} parameters need {sharing * state / _GIB:,.1f} GiB with gradients "
        f"and moments, and activations at least {sharing * activations / _GIB:,.1f} GiB more; {where} has "
        f"{have / _GIB:,.1f} GiB free; take a smaller model or shorter sequences, or more devices to share them "
        "(scripts/plan.py says how many)"
    )


def state_bytes(config: TrainConfig, mesh: Mesh) -> int:
    """Bytes of one device that the state takes at the end of a backward pass: parameters, moments and gradients."""
    state = sharded_abstract_state(config, mesh)

    def of_device(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return of_device(state) + of_device(state.params)


def kept_bytes(config: TrainConfig, mesh: Mesh) -> int:
    """Bytes of one device that hold the layers' inputs for the backward pass; offloading keeps none."""
    if config.model.remat.startswith("offload"):
        return 0
    shards = math.prod(mesh.shape[axis] for axis in TOKEN_AXES)
    tokens = config.micro_batch_size * config.seq_len // shards
    return tokens * config.model.num_layers * config.model.model_dim * jnp.dtype(config.model.compute_dtype).itemsize


def available_on_host() -> int | None:
    """Bytes that this process could still get of the host's memory, swap left out; None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        words = dict(line.split(":", 1) for line in lines)
        free = [int(words["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):  # not Linux
        return None
    for limit in _LIMITS:
        try:
            free.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return min(free)


def _available_on(device: jax.Device) -> int | None:
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
