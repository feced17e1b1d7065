"""Published figures of accelerators, of one JAX device each, with their sources."""

import dataclasses
import types

from ring_attention.hardware.chip import GB, GPU_MEMORY_FRACTION, Chip, GiB
from ring_attention.hardware.gpus import GPUS
from ring_attention.hardware.tpus import TPUS

__all__ = ["CHIPS", "GB", "GPU_MEMORY_FRACTION", "H800", "Chip", "GiB", "chip_of"]

CHIPS = types.MappingProxyType({chip.name: chip for chip in (*TPUS, *GPUS)})
"""Name -> Chip."""


H800 = dataclasses.replace(CHIPS["h100"], name="h800", link=200 * GB)
"""An H100 whose NVLink is cut to 400 GB/s both ways. It is not in the table: only published comparisons need it."""


def chip_of(device_kind: str) -> Chip | None:
    """Find the chip of a JAX device's `device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
