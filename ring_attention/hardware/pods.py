"""Devices of pods that are not there, to compile for from a laptop."""

import contextlib
import importlib
import os

import jax
from jax.experimental import topologies

from ring_attention.checks import ConfigError
from ring_attention.hardware.topology import Topology, find_topology

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin} core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""
_AMPERE = dict(shared=167936, optin=166912, units=64, l2=41943040, clock=1.41, capability="major: 8", cores=108)
_HOPPER = dict(shared=233472, optin=232448, units=128, l2=52428800, clock=1.98, capability="major: 9", cores=132)
_BLACKWELL = dict(shared=233472, optin=232448, units=128, l2=132644864, clock=1.965, capability="major: 10", cores=148)

_GPU_TARGETS = {
    "a100": _AMPERE | dict(memory=84987740160),
    "a100-40": _AMPERE | dict(memory=42298834944),
    "h100": _HOPPER | dict(memory=84942979072),
    "h200": _HOPPER | dict(memory=150001731993),
    "b200": _BLACKWELL | dict(memory=191514411008),
    "gb200": _BLACKWELL | dict(memory=197897748480, cores=152, l2=135528448, clock=2.062),
    "b300": _BLACKWELL | dict(memory=287655434649, capability="major: 10 minor: 3"),
}
"""Published figures of one SXM GPU (NVIDIA's datasheets and CUDA programming guide), as XLA's compiler reads them.

Of shared memory, 64 KiB to 228 KiB a multiprocessor by compute capability, a block can have all but 1 KiB. `memory` is
what the driver leaves. Multiprocessors, caches and clocks of B200 and GB200 are as OpenXLA's own targets have them;
B300's are assumed to be those of B200.
"""

_GPU_COMPILERS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def pod_devices(topology: str) -> list[jax.Device]:
    """Make the devices of a pod to compile for; nothing can run on them.

    Args:
      topology: a TPU slice such as "v5e:16x16", "v3:16x16" (512 cores), "v4:8x8x8" or "v5p:8x8x16", several such as
        "2xv5e:16x16", or hosts and GPUs of each such as "h100:1x8" or "a100:4x8".

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
    options = {"chip_config_name": "megacore"} if pod.chip.name == "v4" else {}
    options |= {"num_slices": pod.slices} if pod.slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=pod.slice_name, **options).devices


def _gpus(pod: Topology) -> list[jax.Device]:
    if pod.chip.name not in _GPU_TARGETS:
        known = ", ".join(_GPU_TARGETS)
        raise ConfigError(f"topology={pod.name!r}: {pod.chip.name} cannot be compiled for here; choose one of {known}")
    _load_gpu_compiler()
    hosts, gpus = pod.sides
    target = _TARGET.format(kind=pod.chip.kinds[0], bandwidth=pod.chip.memory_bandwidth, **_GPU_TARGETS[pod.chip.name])
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{hosts}x{gpus}", target_config=target
    ).devices


def _load_gpu_compiler() -> None:
    """Import the newest of JAX's plugins for CUDA, which registers a compiler and opens no GPU."""
    for name in _GPU_COMPILERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            return
    raise ImportError(f"none of {', '.join(_GPU_COMPILERS)} is installed")
