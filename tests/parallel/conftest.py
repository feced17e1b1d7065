"""Rings may name the kernel without tiles, with which they compile in a quarter of the time."""

import pytest
from ring_helpers import PLAIN

from ring_attention.attention import kernels


@pytest.fixture(autouse=True)
def _plain_kernel_by_name(monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, "plain", PLAIN)
