"""The hardware of Table 2 of the Ring Attention paper (Liu, Zaharia & Abbeel 2023), as printed."""

from typing import NamedTuple

from ring_attention.hardware.chips import GB


class PaperRow(NamedTuple):
    """One row of Table 2.

    Attributes:
      hardware: as the paper calls it.
      flops: operations a second of a device.
      memory: bytes of its HBM.
      bandwidth: bytes a second between two devices.
      block: thousands of tokens.
      tokens: thousands of tokens of a device.
    """

    hardware: str
    flops: float
    memory: float
    bandwidth: float
    block: float
    tokens: float


PAPER_TABLE_2 = (
    PaperRow("A100 NVLink", 312e12, 80 * GB, 300 * GB, 1.0, 6.2),
    PaperRow("A100 InfiniBand", 312e12, 80 * GB, 12.5 * GB, 24.5, 149.5),
    PaperRow("TPU v3", 123e12, 16 * GB, 112 * GB, 1.1, 6.6),
    PaperRow("TPU v4", 275e12, 32 * GB, 268 * GB, 1.0, 6.2),
    PaperRow("TPU v5e", 196e12, 16 * GB, 186 * GB, 1.1, 6.3),
)
"""The bandwidths of TPUs are those of all links of a chip together; a ring uses one of them each way."""
