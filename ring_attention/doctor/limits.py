"""What a process runs on and how much of it: versions, driver, memory."""

import importlib
import os
import platform
import subprocess
from collections.abc import Sequence

import jax

from ring_attention.planning.compile_report import versions
from ring_attention.training.validate import available_on_host

PACKAGES = ("ring_attention", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "tokamax")
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def find_limits(devices: Sequence[jax.Device]) -> dict:
    """Look up versions and limits, bytes where they are memory; what is not there, or does not say, is None."""
    return {
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
        "cudnn": _cudnn(),
        "driver": _driver(),
        "memory_fraction": os.environ.get(FRACTION),
        "host_memory": available_on_host(),
        "devices": [
            {
                "kind": device.device_kind,
                "memory": (device.memory_stats() or {}).get("bytes_limit"),
                "compute_capability": getattr(device, "compute_capability", None),
            }
            for device in devices
        ],
    }


def _cudnn() -> str | None:
    """The version of cuDNN, such as 9.10.2; it has no public name in JAX."""
    try:
        number = importlib.import_module("jax._src.lib").cuda_versions.cudnn_get_version()
    except Exception:  # no CUDA plugin, or another JAX: it is told of, and nothing depends on it
        return None
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
