"""Devices of pods that are not there, to compile for from a laptop."""

import contextlib
import importlib
import os

import jax
from jax.experimental import topologies

from ring_attention.checks import ConfigError
from ring_attention.hardware.topology import Topology, find_topology

_H100_SXM = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_A100_SXM = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 167936
  threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 2039000000000 l2_cache_size: 41943040
  clock_rate_ghz: 1.41 device_memory_size: 84987740160 shared_memory_per_block_optin: 166912
  cuda_compute_capability { major: 8 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA A100-SXM4-80GB"
"""

_GPU_TARGETS = {"h100": _H100_SXM, "a100": _A100_SXM}
"""Published figures of one SXM GPU (NVIDIA's datasheets and CUDA programming guide), as XLA's compiler reads them.

The programming guide gives compute capability 8.0 a cache of 192 KiB a multiprocessor, of which 164 KiB can be shared
memory, 163 KiB of one block. device_memory_size is what the driver leaves of 80 GiB.
"""

_GPU_COMPILERS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def pod_devices(topology: str) -> list[jax.Device]:
    """Make the devices of a pod to compile for; nothing can run on them.

    Args:
      topology: a TPU slice such as "v5e:16x16", "v3:16x16" (512 cores), "v4:8x8x8" or "v5p:8x8x16", or hosts and GPUs
        of each such as "h100:1x8" or "a100:4x8".

    Raises:
      ConfigError: if there is no such topology, or the compiler for it is not installed.
    """
    pod = find_topology(topology)
    # The TPU compiler is held for one process at a time, as if it opened chips; to compile it opens none.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return _tpus(pod) if pod.tpu else _gpus(pod)
    except ConfigError:
        raise
    except Exception as error:  # each compiler raises its own
        reason = str(error).strip().partition("\n")[0]
        if "INVALID_ARGUMENT" in reason:
            remedy = "choose a slice that is sold, such as v5e:16x16, v3:16x16 or v4:8x8x8"
        elif isinstance(error, NotImplementedError):  # the plugin looks for a GPU unless it is told not to
            remedy = "set JAX_PLATFORMS=cpu, to compile without a GPU"
        else:
            remedy = f"install the compiler with pip install -e '.[{'compile-tpu' if pod.tpu else 'compile-gpu'}]'"
        raise ConfigError(f"topology={topology!r}: {reason}; {remedy}") from error


def _tpus(pod: Topology) -> list[jax.Device]:
    megacore = {"chip_config_name": "megacore"} if pod.chip.name == "v4" else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=pod.name, **megacore).devices


def _gpus(pod: Topology) -> list[jax.Device]:
    if pod.chip.name not in _GPU_TARGETS:
        known = ", ".join(_GPU_TARGETS)
        raise ConfigError(f"topology={pod.name!r}: {pod.chip.name} cannot be compiled for here; choose one of {known}")
    _load_gpu_compiler()
    hosts, gpus = pod.sides
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{hosts}x{gpus}", target_config=_GPU_TARGETS[pod.chip.name]
    ).devices


def _load_gpu_compiler() -> None:
    """Import the newest of JAX's plugins for CUDA, which registers a compiler and opens no GPU."""
    for name in _GPU_COMPILERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            return
    raise ImportError(f"none of {', '.join(_GPU_COMPILERS)} is installed")
