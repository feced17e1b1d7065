"""Pods that are not there: devices to compile for, from a laptop."""

import os

import jax
from jax.experimental import topologies

from ring_attention.checks import ConfigError

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
"""Published figures of one H100 SXM (NVIDIA's datasheet and CUDA programming guide), as XLA's compiler reads them."""


def pod_devices(topology: str) -> list[jax.Device]:
    """Devices of a pod to compile for; nothing can run on them.

    Args:
      topology: a TPU slice such as "v5e:16x16", "v4:8x8x8" or "v5p:8x8x16", or "h100:HOSTSxGPUS" such as "h100:1x8".

    Raises:
      ConfigError: if the compiler for it is not installed, or does not know the topology.
    """
    chip, _, shape = topology.partition(":")
    gpu = chip == "h100"
    # The TPU compiler is held for one process at a time, as if it opened chips; to compile it opens none.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        if gpu:
            import jax_plugins.xla_cuda12  # noqa: F401  registers the compiler; opens no GPU

            return topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=f"1x{shape}", target_config=_H100_SXM
            ).devices
        megacore = {"chip_config_name": "megacore"} if chip == "v4" else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **megacore).devices
    except Exception as error:  # each compiler raises its own
        extra = "compile-gpu" if gpu else "compile-tpu"
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"topology={topology!r}: {reason}; install the compiler with pip install -e '.[{extra}]', "
            "and write it like v5e:16x16 or h100:1x8"
        ) from error
