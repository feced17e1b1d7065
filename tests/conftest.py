"""Every test runs on eight simulated CPU devices.

The quick ones compile as quickly as XLA can, those that are asked for by a marker as users do.
"""

import os

import jax

jax.config.update("jax_num_cpu_devices", 8)

QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""The same operations as machine code that nobody optimised: half the time, most of which is compilation."""


def pytest_configure(config):
    """Before a backend exists. Scripts that tests start inherit it; flags of the environment come after, and win."""
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}"
