"""Every test runs on eight simulated CPU devices.

The quick ones compile as quickly as XLA can, those that are asked for by a marker as users do.
"""

import gc
import os

import jax
import pytest
from quick_compile import OPTIONS
from ring_helpers import PLAIN

from ring_attention.attention import kernels

jax.config.update("jax_num_cpu_devices", 8)

gc.set_threshold(100_000, 20, 20)  # to look for garbage as often as by default takes 6% of the time


def pytest_configure(config):
    """Before a backend exists. Scripts that tests start inherit it; flags of the environment come after, and win."""
    if "not slow" in config.option.markexpr:
        flags = [f"--{name}={value}" for name, value in OPTIONS.items()]
        os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])


SURROUNDINGS = ("models", "training", "inference", "evaluation")
"""Rooms whose tests are about what surrounds the kernel."""


@pytest.fixture(scope="module")
def plain_kernel():
    """Let rings of a module compute their blocks without tiles, and compile in a quarter of the time.

    The kernel that people use is compared with the oracle in tests/attention and, in rings, in tests/parallel.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.KERNELS, "xla", PLAIN._replace(name="xla"))
        yield  # programs are kept by kernel, so that none of the other one is met


@pytest.fixture(scope="module", autouse=True)
def _plain_kernel_in_surroundings(request):
    if request.path.parent.name in SURROUNDINGS:
        request.getfixturevalue("plain_kernel")
