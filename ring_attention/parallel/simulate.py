"""Simulated devices: a ring of CPU devices on one machine, so that a laptop runs what a pod runs."""

import os

import jax

from ring_attention.checks import is_whole, require, shown
from ring_attention.parallel.xla_flags import knows_flag

MOST_DEVICES = 4096
"""The most devices that make sense: each has threads and buffers of its own."""

_PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 7200,
}
"""XLA ends a process whose devices wait too long for each other, and with many to a core a long hop is a long wait."""


def simulate_devices(count: int) -> None:
    """Give the CPU backend `count` devices, and the patience to let them take turns on few cores.

    Call it before anything that touches an array. Flags that the user has set in XLA_FLAGS stay as they are. Where an
    accelerator is the default backend, `jax.devices()` is not affected.

    Raises:
      ValueError: for a number of devices that no machine can simulate.
      RuntimeError: if the CPU backend has already started with fewer devices.
    """
    fits = is_whole(count, 1) and count <= MOST_DEVICES
    require(fits, f"cannot simulate {shown(count)} devices, need 1 to {MOST_DEVICES}; choose a smaller mesh")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        _require_started_with(count)
        return
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {name: seconds for name, seconds in _PATIENCE.items() if f"--{name}=" not in flags and knows_flag(name)}
    extra = [f"--{name}={seconds}" for name, seconds in wanted.items()]
    os.environ["XLA_FLAGS"] = " ".join([flags, *extra]).strip()


def _require_started_with(count: int) -> None:
    """Raise RuntimeError unless the backend that runs is an accelerator or has at least `count` devices."""
    started = jax.device_count()
    if jax.default_backend() == "cpu" and started < count:
        raise RuntimeError(
            f"JAX has started with {started} CPU devices, need {count}; call simulate_devices({count}) before anything "
            "that touches an array or a device"
        )
