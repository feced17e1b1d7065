"""Every test runs on eight simulated CPU devices.

The quick ones compile as quickly as XLA can, those that are asked for by a marker as users do.
"""

import os

import jax
from quick_compile import OPTIONS

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """Before a backend exists. Scripts that tests start inherit it; flags of the environment come after, and win."""
    if "not slow" in config.option.markexpr:
        flags = [f"--{name}={value}" for name, value in OPTIONS.items()]
        os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
