"""Published figures of accelerators, of one JAX device each, and what programs reach of them, with their sources."""

import dataclasses
import types

from ring_attention.hardware.chip import GB, GPU_MEMORY_FRACTION, Chip, GiB
from ring_attention.hardware.gpus import GPUS
from ring_attention.hardware.tpus import TPUS

__all__ = ["CHIPS", "EFFICIENCY", "GB", "GPU_MEMORY_FRACTION", "H800", "Chip", "Efficiency", "GiB", "chip_of"]

CHIPS = types.MappingProxyType({chip.name: chip for chip in (*TPUS, *GPUS)})
"""Name -> Chip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Fractions of the published peak that programs reach.

    Attributes:
      matmul: dense layers.
      attention: a fused attention kernel forward, counting the pairs that the mask shows.
      attention_backward: the same backward, at 2.5 times the operations.
      source: where they come from.
    """

    matmul: float
    attention: float
    attention_backward: float
    source: str


EFFICIENCY = {
    "gpu": Efficiency(
        matmul=0.7,
        attention=0.59,
        attention_backward=0.52,
        source="attention: cuDNN on H100, 567-608 and 488-534 of 989 TFLOP/s (FlashAttention-3 paper); "
        "dense layers: 697 of 989, measured by scripts/doctor.py",
    ),
    "tpu": Efficiency(
        matmul=0.7,
        attention=0.59,
        attention_backward=0.52,
        source="assumed to be as on H100; MaxText reports 52-53% of the peak for whole steps on v5p",
    ),
}
"""Platform -> Efficiency."""

H800 = dataclasses.replace(CHIPS["h100"], name="h800", link=200 * GB)
"""An H100 whose NVLink is cut to 400 GB/s both ways. It is not in the table: only published comparisons need it."""


def chip_of(device_kind: str) -> Chip | None:
    """Find the chip of a JAX device's `device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
