"""What JAX's kernels for TPU need of a chip's memory: which tiles fit, and which backward pass is worth its buffer.

A kernel's tiles lie in VMEM, of which the compiler lets one kernel have a part; its table of tiles lies in SMEM. A
kernel that needs more does not compile, after minutes and in words that hide why. So it is refused before.
"""

import functools
import os
import re
from typing import NamedTuple

import jax

from ring_attention.checks import require
from ring_attention.hardware.chips import chip_of

LANES = 128
"""Tiles are multiples of this, and so is the last axis of an array in VMEM."""

MiB = 2**20

VMEM = {"v4": 16 * MiB, "v5e": 16 * MiB, "v5p": 16 * MiB, "v6e": 32 * MiB, "tpu7x": 32 * MiB}
"""What the compiler of libtpu 0.0.42 lets a kernel have of VMEM unless it is told otherwise, by chip."""

SMEM = MiB - 2048
"""What a kernel's table of tiles may take of it: the compiler keeps 1.1 KiB for itself."""

FUSED_BYTES = 64 * MiB
"""What the buffer of the fused backward kernel may take at a time. A training step on 16 v5e chips with 512 MiB of it
took 1.3 GiB more than with two kernels (docs/experiments.md)."""

FUSED_TILE = 512
"""Keys of a tile from which on the fused backward kernel pays. For each of them it saves 4 D operations a query, and
it writes and reads 2 D elements a query for each tile: in bfloat16 so many operations for a byte as a tile has keys.
Chips do 166 (v5p) to 560 (v6e) while they move one, half of these in attention."""


_ENTRY = 8
"""Bytes of a tile in the table."""


def max_columns(rows: int) -> int:
    """The most tiles of keys that a call with so many tiles of queries has room for in its table."""
    return SMEM // (_ENTRY * rows * LANES) * LANES


class Tiles(NamedTuple):
    """The tiles of a call: how many tokens they hold, and how many there are, of queries and of keys."""

    q: int
    kv: int
    rows: int
    columns: int


class _Kernel(NamedTuple):
    """What a kernel keeps in VMEM.

    Attributes:
      rows: [q,D] arrays that come and go, each twice.
      columns: [kv,D] arrays that come and go, each twice.
      row_sums: float32 [q,D] that stay.
      column_sums: float32 [kv,D] that stay.
      statistics: float32 [q,LANES] that stay, or come and go.
      scores: float32 [q,kv], beside those.
      softcap: float32 [q,kv] more, where scores are capped.
    """

    rows: int
    columns: int
    row_sums: int
    column_sums: int
    statistics: int
    scores: float
    softcap: float


_KERNELS = {
    "forward": _Kernel(rows=2, columns=2, row_sums=1, column_sums=0, statistics=4, scores=1.03, softcap=0),
    "dq": _Kernel(rows=3, columns=2, row_sums=1, column_sums=0, statistics=0, scores=1.12, softcap=0.6),
    "dkv": _Kernel(rows=2, columns=4, row_sums=0, column_sums=2, statistics=0, scores=1.17, softcap=1),
    "fused": _Kernel(rows=3, columns=4, row_sums=0, column_sums=2, statistics=0, scores=1.36, softcap=0.6),
}
"""Counted in the library's source, but for the scores, which are what the compiler for v5e was seen to take: within 10%
where head dims or dtypes are usual, within 20% otherwise (docs/kernels.md)."""

_FEWER_SCORES = {"v6e": dict(forward=0.18)}
"""Of a chip whose compiler keeps only a part of them at a time."""


def vmem_bytes(kernel: str, q: int, kv: int, like, softcap: bool = False, chip: str = "v5e") -> int:
    """What a kernel needs of VMEM for tiles of so many queries and keys, for head dim and dtype of the array `like`."""
    of, D, itemsize = _KERNELS[kernel], -(-like.shape[-1] // LANES) * LANES, like.dtype.itemsize
    scores = _FEWER_SCORES.get(chip, {}).get(kernel, of.scores)
    moving = 2 * itemsize * D * (of.rows * q + of.columns * kv)
    staying = 4 * (D * (of.row_sums * q + of.column_sums * kv) + LANES * of.statistics * q)
    products = 0 if kernel == "forward" else 4 * (D - LANES) * (q + kv)
    return moving + staying + products + int(4 * (scores + of.softcap * softcap) * q * kv)


def fused_groups(tiles: Tiles, q, kv_heads: int, softcap: bool = False) -> int:
    """In how many groups of heads a call with queries [H,t,D] takes the kernel that gives all three gradients.

    It makes 5 products for each pair of tiles, where a kernel for dq and one for dk and dv make 7 between them. But it
    leaves dq as one array for each tile of keys, to be summed; so heads take turns where that is large. Returns 0 where
    the two kernels are better.
    """
    limit, chip, _ = _vmem()
    room = 0.9 * limit  # where the estimate is near the limit, two kernels do that need less
    small = tiles.columns > 1 and tiles.kv < FUSED_TILE
    if small or vmem_bytes("fused", tiles.q, tiles.kv, q, softcap, chip) > room:
        return 0
    buffer = tiles.columns * q.size * q.dtype.itemsize
    groups = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and buffer <= n * FUSED_BYTES)
    return next(groups, 0)


def require_memory(kernel: str, tiles: Tiles, q, softcap: bool = False) -> None:
    """Raise ValueError unless the kernel's tiles, for queries [H,t,D], fit into the chip's VMEM and SMEM."""
    limit, chip, kind = _vmem()
    needed, smaller = vmem_bytes(kernel, tiles.q, tiles.kv, q, softcap, chip), [tiles.q, tiles.kv]
    while vmem_bytes(kernel, smaller[0], smaller[1], q, softcap, chip) > 0.8 * limit and max(smaller) > LANES:
        larger = smaller.index(max(smaller))
        smaller[larger] = max(smaller[larger] // (2 * LANES), 1) * LANES
    require(
        needed <= limit,
        f'impl="splash" with tiles of {tiles.q} queries and {tiles.kv} keys of head dim {q.shape[-1]} needs about '
        f"{needed / MiB:.1f} MiB of VMEM for its {kernel} kernel, but the compiler for {kind} lets a kernel have "
        f"{limit / MiB:g} MiB; use smaller block_sizes, such as BlockSizes(q={smaller[0]}, kv={smaller[1]})",
    )
    table = _ENTRY * tiles.rows * -(-tiles.columns // LANES) * LANES
    require(
        table <= SMEM,
        f'impl="splash" keeps a table of its {tiles.rows} x {tiles.columns} tiles, {table / MiB:.1f} MiB, in SMEM, '
        f"which has 1 MiB; use larger block_sizes than q={tiles.q}, kv={tiles.kv}, or more devices",
    )


def _vmem() -> tuple[float, str, str]:
    """Bytes of VMEM that a kernel may have on the devices that are traced for, inf where unknown; chip, and kind."""
    kind = _device_kind()
    chip = chip_of(kind)
    name = chip.name if chip else ""
    told = _told_limit(os.environ.get("LIBTPU_INIT_ARGS", ""))
    return told or VMEM.get(name, float("inf")), name, kind


def _device_kind() -> str:
    """The kind of device that a program is traced for: of the mesh that is set, or else of the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0].device_kind if device is None else device.device_kind


@functools.cache
def _told_limit(arguments: str) -> int | None:
    """What the compiler's arguments say, or None."""
    told = re.findall(r"--xla_tpu_scoped_vmem_limit_kib=(\d+)", arguments)
    return int(told[-1]) * 1024 if told else None
