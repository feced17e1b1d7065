"""What programs reach of a chip's published figures: dense layers, memory, wires, and attention by each kernel."""

import dataclasses

from ring_attention.hardware.chip import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """Fractions of a chip's published figures that programs reach, and what every transfer costs beside its bytes.

    Attributes:
      matmul: of `Chip.flops`, dense layers of a thousand tokens and more.
      memory: of `Chip.memory_bandwidth`, passes over large arrays.
      link, network, host_link: of the wires of these names.
      latency: seconds from the start of a transfer to a neighbour, or of a collective, until bytes flow.
      network_latency: the same where it leaves the host or the slice.
      source: where they come from.
    """

    matmul: float
    memory: float
    link: float
    network: float
    host_link: float
    latency: float
    network_latency: float
    source: str


_H100 = Reach(
    matmul=0.7,
    memory=0.71,
    link=0.8,
    network=0.9,
    host_link=0.83,
    latency=15e-6,
    network_latency=30e-6,
    source="dense layers 680-750 of 989 TFLOP/s, memory 2.4 of 3.35 TB/s, host 53 of 64 GB/s: measured on an H100 "
    "(docs/kernels.md); wires: NCCL's tests as their users publish them",
)
_TPU = Reach(
    matmul=0.75,
    memory=0.8,
    link=0.9,
    network=0.9,
    host_link=0.83,
    latency=2e-6,
    network_latency=50e-6,
    source="dense layers fitted to published steps of MaxText on v5p, v6e and Ironwood (docs/planner.md); the rest "
    "assumed",
)


def _as_h100(**changes) -> Reach:
    return dataclasses.replace(_H100, source="assumed to be as on H100", **changes)


REACH = {
    "h100": _H100,
    "h800": _H100,
    "h200": _as_h100(),
    "a100": _as_h100(matmul=0.8, memory=0.8),
    "a100-40": _as_h100(matmul=0.8, memory=0.8),
    "v4": dataclasses.replace(_TPU, matmul=0.8),
    "v5e": dataclasses.replace(_TPU, matmul=0.85),
    "tpu": _TPU,
    "gpu": _as_h100(),
}
"""Chip, or platform of those that have no row -> Reach."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRate:
    """How fast an attention kernel is on a chip.

    Attributes:
      kernel: its name, such as "cudnn".
      chips: names of those that it holds for.
      head_dim: the largest that it holds for.
      forward: fraction of `Chip.flops`, counting 4 * D operations for each pair and head that the mask shows.
      backward: the same backward, counting 2.5 times the operations.
      call, call_backward: seconds of a call beside its pairs.
      source: where they come from.
    """

    kernel: str
    chips: tuple[str, ...]
    head_dim: int = 256
    forward: float
    backward: float
    call: float = 0.0
    call_backward: float = 0.0
    source: str


_HOPPER = ("h100", "h800", "h200")
_CALL = dict(call=50e-6, call_backward=200e-6)
_TPU_CALL = dict(call=10e-6, call_backward=20e-6)
_H100_RUN = "measured on an H100 (docs/kernels.md)"

KERNEL_RATES = (
    KernelRate(kernel="cudnn", chips=_HOPPER, head_dim=64, forward=0.46, backward=0.43, source=_H100_RUN, **_CALL),
    KernelRate(kernel="cudnn", chips=_HOPPER, head_dim=128, forward=0.63, backward=0.55, source=_H100_RUN, **_CALL),
    KernelRate(
        kernel="cudnn",
        chips=_HOPPER,
        forward=0.58,
        backward=0.44,
        source="FlashAttention-3 paper, cuDNN with head dim 256; backward assumed",
        **_CALL,
    ),
    KernelRate(kernel="tokamax", chips=_HOPPER, forward=0.63, backward=0.48, source=_H100_RUN, **_CALL),
    KernelRate(
        kernel="cudnn",
        chips=("a100", "a100-40"),
        forward=0.62,
        backward=0.53,
        source="FlashAttention-2 paper, 190-225 and 165-190 of 312 TFLOP/s; cuDNN assumed to be as fast",
        **_CALL,
    ),
    KernelRate(
        kernel="cudnn",
        chips=("b200", "gb200", "b300"),
        forward=0.6,
        backward=0.46,
        source="MagiAttention's charts, B200: 1290 and 1027 of 2250 TFLOP/s",
        **_CALL,
    ),
    KernelRate(
        kernel="splash",
        chips=("v5p", "v6e", "tpu7x"),
        forward=0.35,
        backward=0.27,
        source="fitted to published steps of MaxText on v5p, v6e and Ironwood (docs/planner.md), never measured here",
        **_TPU_CALL,
    ),
    KernelRate(
        kernel="splash",
        chips=("v5e", "v4", "v3"),
        forward=0.45,
        backward=0.35,
        source="assumed: nobody publishes it, and slower chips reach more of their peak than v5p",
        **_TPU_CALL,
    ),
)
"""The first row of a kernel, chip and head dim holds."""

SCORE_PASSES, SCORE_PASSES_BACKWARD = 7, 11
"""Passes over the scores in float32, which XLA's tiles write to memory: an H100 does 44 and 70 TFLOP/s of whole tiles.
"""


def reach_of(chip: Chip) -> Reach:
    """Find what programs reach of a chip."""
    return REACH.get(chip.name) or REACH[chip.platform]


def kernel_rate(chip: Chip, kernel: str, head_dim: int) -> KernelRate:
    """Find how fast a kernel is on a chip; where nobody published it, as fast as on another, and the source says so."""
    if kernel == "xla":
        return _tiles_rate(chip, head_dim)
    rows = [row for row in KERNEL_RATES if row.kernel == kernel and head_dim <= row.head_dim]
    if here := [row for row in rows if chip.name in row.chips]:
        return here[0]
    if not rows:
        return _tiles_rate(chip, head_dim)
    other = rows[0]
    return dataclasses.replace(other, source=f"assumed to be as on {other.chips[0]}: {other.source}")


def _tiles_rate(chip: Chip, head_dim: int) -> KernelRate:
    """XLA's tiles, which wait for memory: a score is 4 bytes and 4 * D operations forward, 10 * D backward."""
    pairs = reach_of(chip).memory * chip.memory_bandwidth / 4
    matmul = reach_of(chip).matmul
    return KernelRate(
        kernel="xla",
        chips=(chip.name,),
        forward=min(4 * head_dim * pairs / SCORE_PASSES / chip.flops, matmul),
        backward=min(10 * head_dim * pairs / SCORE_PASSES_BACKWARD / chip.flops, matmul),
        source=f"{SCORE_PASSES} and {SCORE_PASSES_BACKWARD} passes over the scores in memory, as measured on an H100",
    )
