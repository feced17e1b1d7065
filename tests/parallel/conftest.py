"""Rings may name the kernel without tiles, with which they compile in a quarter of the time, or the one with tiles."""

import pytest
from ring_helpers import PLAIN

from ring_attention.attention import kernels

TILES = kernels.KERNELS["xla"]  # before `plain_kernel` puts another in its place


@pytest.fixture(autouse=True)
def _kernels_by_name(monkeypatch):
    """`impl="plain"`, and `impl="tiles"` for modules that use `plain_kernel`, where what is tested is up to tiles."""
    monkeypatch.setitem(kernels.KERNELS, "plain", PLAIN)
    monkeypatch.setitem(kernels.KERNELS, "tiles", TILES)
