"""Whether a config can run on a mesh, decided before anything is opened or compiled."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from ring_attention.attention.kernels import find_kernel, require_platform
from ring_attention.attention.kernels.contract import Kernel
from ring_attention.checks import ConfigError, require, require_divisible, require_field
from ring_attention.data.tokenizers import Tokenizer
from ring_attention.hardware.chips import GiB
from ring_attention.parallel.dealt_rows import default_chunks
from ring_attention.parallel.host_memory import PINNED_HOST
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import SEQUENCE, TENSOR
from ring_attention.parallel.sharding import TOKEN_AXES, check_fits
from ring_attention.training.attend import check_kinds
from ring_attention.training.attention_config import DOCUMENTS
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import config_to_dict
from ring_attention.training.state import sharded_abstract_state

_INT32_MAX = 2**31 - 1
"""Largest number of anything that is counted: steps, tokens, positions and the axes of an array are int32."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""What a container may have of the host's memory; what it uses of that is mostly files, which give way."""


def validate_config(config: TrainConfig, mesh_shape: dict[str, int], platform: str | None = None) -> None:
    """Raise ConfigError, saying what is wrong, unless the config can run on a mesh of this shape.

    Every sharded axis must divide by its share of the mesh, the strategy and the kernel must be able to do what is
    asked of them, and the kernel must run on devices of this platform, if it is given.
    """
    model = config.model
    _check_sizes(config)
    try:
        config.attention.make_layout(mesh_shape[SEQUENCE]).check_length(config.seq_len)
        config.attention.make_dealing(mesh_shape[SEQUENCE]).check_length(config.seq_len)
        check_fits("batch_size / optimizer.accumulation_steps", config.micro_batch_size, "batch", mesh_shape)
        check_fits("model.num_heads", model.num_heads, "heads", mesh_shape)
        check_fits("model.num_kv_heads", model.num_kv_heads, "kv_heads", mesh_shape)
        check_fits("model.ffn_dim", model.ffn_dim, "ffn", mesh_shape)
        check_fits("model.vocab_size", model.vocab_size, "vocab", mesh_shape)
        require_divisible(
            "model.num_kv_heads",
            model.num_kv_heads,
            "mesh.tp * model.head_groups",
            mesh_shape[TENSOR] * model.head_groups,
            "use fewer groups",
        )
        check_attention(config, mesh_shape)
        if platform is not None:
            require_platform(find_kernel(config.attention.impl), platform)
        require(
            platform != "tpu" or model.remat != "offload" or model.head_groups == 1,
            f'model.head_groups={model.head_groups} with model.remat="offload": the TPU compiler cannot take one '
            'layer\'s group from the host; use remat="offload_input", or head_groups=1',
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_sizes(config: TrainConfig) -> None:
    """Raise ConfigError for a count that 32 bits do not hold; seeds are no counts."""
    for field, value in flatten_dict(config_to_dict(config), sep=".").items():
        is_count = type(value) is int and not field.endswith("seed")
        require_field(
            not is_count or value <= _INT32_MAX,
            field,
            value,
            f"must be at most {_INT32_MAX}, as 32 bits hold",
            "give less",
        )


def check_attention(config: TrainConfig, mesh_shape: dict[str, int], kernel: Kernel | None = None) -> None:
    """Raise ValueError unless strategies and kernel, by default the config's, can do what it asks on each device."""
    P, dealt = mesh_shape[SEQUENCE], config.attention.layout == DOCUMENTS
    chunks = default_chunks(config.seq_len // P)
    layout = SequenceLayout("given", P, given_chunks=chunks) if dealt else config.attention.make_layout(P)
    parts = mesh_shape[TENSOR] * config.model.head_groups
    shard_len = config.seq_len // layout.ring_size
    check_kinds(config.attention, config.transformer, layout, shard_len, parts, kernel=kernel)


def check_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError unless the embedding has a row for every token."""
    require_field(
        config.model.vocab_size >= tokenizer.vocab_size,
        "model.vocab_size",
        config.model.vocab_size,
        f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} tokens",
        f"use at least {tokenizer.vocab_size}, rounded up to a multiple of the mesh's tp",
    )


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
        f"model: its {config.transformer.num_parameters:,} parameters need {sharing * state / GiB:,.1f} GiB with "
        f"gradients and moments, and activations at least {sharing * activations / GiB:,.1f} GiB more; {where} has "
        f"{have / GiB:,.1f} GiB free; take a smaller model or shorter sequences, or more devices to share them "
        "(scripts/plan.py says how many)"
    )


def state_bytes(config: TrainConfig, mesh: Mesh) -> int:
    """Return the bytes of one device that parameters, moments and gradients take at the end of a backward pass.

    What `optimizer.offload` keeps in the memory of an accelerator's host is not counted.
    """
    state, shared = sharded_abstract_state(config, mesh), mesh.devices.flat[0].platform == "cpu"

    def of_device(tree) -> int:
        here = [x for x in jax.tree.leaves(tree) if shared or x.sharding.memory_kind != PINNED_HOST]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)

    return of_device(state) + of_device(state.params)


def kept_bytes(config: TrainConfig, mesh: Mesh) -> int:
    """Return the bytes of one device that hold the layers' inputs for the backward pass; offloading keeps none."""
    if config.model.remat.startswith("offload"):
        return 0
    shards = math.prod(mesh.shape[axis] for axis in TOKEN_AXES)
    tokens = config.micro_batch_size * config.seq_len // shards
    return tokens * config.model.num_layers * config.model.model_dim * jnp.dtype(config.model.compute_dtype).itemsize


def available_on_host() -> int | None:
    """Return the bytes of the host's memory that this process could still get, without swap; None if unknown."""
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
