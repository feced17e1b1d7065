"""The devices that a command runs on: the mesh over them, the host's allocator, and how fast they can be."""

import ctypes
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ring_attention.checks import ConfigError
from ring_attention.hardware.chips import chip_of
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.training.config import MeshConfig, TrainConfig

SIMULATED_DEVICES = 8

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # names and numbers of glibc's malloc.h


def open_mesh(config: MeshConfig, num_processes: int = 1) -> Mesh:
    """Make the mesh over all accelerators or, where there are none, over as many simulated devices as it needs."""
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


def keep_freed_memory() -> bool:
    """Let this process keep memory that is freed; returns whether its C library can (glibc).

    XLA's CPU client allocates a step's working memory anew at each step. By default glibc gives so large a block back
    to the system, which clears and maps every page of it again at the next step: 2 to 4% of its time
    (docs/benchmarks.md). Call it before JAX starts its threads. The process then stays as large as it once was.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1})  # one heap, which only grows


def return_freed_memory() -> bool:
    """Undo `keep_freed_memory`, for a process whose steps turn out to run elsewhere."""
    return _set({_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 128 * 1024, _M_ARENA_MAX: 0})  # glibc's defaults


def _set(options: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all([mallopt(option, value) == 1 for option, value in options.items()])


def warn_of_order(config: TrainConfig, platform: str) -> list[str]:
    """What a person should know of gradients that differ from run to run on such devices, as lines to print."""
    flag = "--xla_gpu_exclude_nondeterministic_ops=true"
    fused = config.attention.impl in ("auto", "cudnn") and config.model.compute_dtype != "float32"
    if platform != "gpu" or not fused or flag in os.environ.get("XLA_FLAGS", ""):
        return []
    return [
        "cuDNN adds up gradients in no fixed order on some GPUs: a resumed run has the same losses bit by bit only "
        f"with XLA_FLAGS={flag}, which takes more memory (docs/reliability.md)."
    ]


def machine_peak_flops(devices: Sequence[jax.Device]) -> tuple[float | None, str]:
    """Return (operations a second of all `devices` together, where the figure comes from).

    Accelerators: the published dense bfloat16 peak. CPU: the best float32 matrix product, measured once in less than a
    second; simulated devices share the cores, so their number does not count. An accelerator that is not in the table
    gives (None, the reason).
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return _measure_cpu(), "measured: a float32 matrix product on all cores"
    if chip := chip_of(kind):
        return chip.flops * len(devices), f"published bfloat16 peak of {len(devices)} x {kind}"
    return None, f"no published peak is known here for {kind!r}"


@functools.cache
def _measure_cpu(size: int = 2048, runs: int = 3) -> float:
    """Return the best rate of `runs` products of two [size, size] float32 matrices."""
    device = jax.devices("cpu")[0]
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
