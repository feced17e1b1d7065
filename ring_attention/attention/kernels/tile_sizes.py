"""Sizes of tiles for a kernel and a kind of device, where nobody gives any.

None of them was measured by us. Each row says where it comes from.
"""

import dataclasses

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.device_kind import DeviceKind
from ring_attention.hardware.chips import chip_of

MOST_HEADS = 32
"""Query heads of a tile of "xla" on accelerators, at most 8 key/value heads: the scores of 32 heads and 512 x 1024
tokens are 64 MiB in float32, and a backward pass has about four arrays of them. Fewer heads leave the chip idle, tiles
as small as a CPU's (whose cache they fit) spend their time starting loops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Tiles of one kernel on some devices.

    Attributes:
      kernel: its name.
      platform: of the devices.
      chips: those of the platform that it is for, as in `hardware.CHIPS`; empty for all others.
      head_dim: the largest that it is for.
      q, kv: query and key tokens of a tile.
      source: where they come from.
    """

    kernel: str
    platform: str
    chips: tuple[str, ...] = ()
    head_dim: int
    q: int
    kv: int
    source: str


_COMPILED = (
    "steps with these compile within the VMEM that a kernel has by default (docs/planner.md); MaxText's for v5p "
    "and v6e have 2048 x 2048, with a limit that they raise"
)
_MAXTEXT = "sa_block_q and sa_block_kv of MaxText's base configuration, for every chip"
_TILED = "configs/{}: predicted and compiled memory agree (docs/planner.md)"

ROWS = (
    Row(
        kernel="splash",
        platform="tpu",
        chips=("v4", "v5e", "v5p", "v6e", "tpu7x"),
        head_dim=128,
        q=512,
        kv=1024,
        source=_COMPILED,
    ),
    Row(kernel="splash", platform="tpu", head_dim=256, q=512, kv=512, source=_MAXTEXT),
    Row(kernel="xla", platform="tpu", head_dim=256, q=512, kv=1024, source=_TILED.format("tpu_v5e_256_7b.py")),
    Row(kernel="xla", platform="gpu", head_dim=256, q=1024, kv=1024, source=_TILED.format("gpu_8xh100_7b.py")),
)
"""The first row that holds counts. "cudnn" and "tokamax" have tiles of their own; those of "xla" are for what they
leave to that."""


def tiles_of(kernel: str, kind: DeviceKind, head_dim: int, group: int) -> BlockSizes:
    """Look up the tiles of a kernel.

    Args:
      kernel: its name.
      kind: of the devices; where it is not known, and on a CPU, the defaults of `BlockSizes`.
      head_dim: D. Where it is larger than any in the table, tiles have half as many keys as those for the largest.
      group: query heads for each key/value head.
    """
    chip = chip_of(kind.name) if kind.name else None
    name = "xla" if kernel in ("cudnn", "tokamax") else kernel
    rows = [
        row
        for row in ROWS
        if (row.kernel, row.platform) == (name, kind.platform) and (not row.chips or (chip and chip.name in row.chips))
    ]
    if not rows:
        return BlockSizes()
    row = next((row for row in rows if head_dim <= row.head_dim), rows[-1])
    kv = row.kv if head_dim <= row.head_dim else row.kv // 2
    return BlockSizes(q=row.q, kv=kv, cut=2, heads=max(min(8, MOST_HEADS // group), 1))


DECODING_SLOTS = {"gpu": 8192}
"""Platform -> slots of a cache that decoding reads at once. An H100 took 34 microseconds for each tile of 256 slots, in
which it could read 80 MB (docs/kernels.md)."""


def slots_of(kind: DeviceKind, head_dim: int, group: int) -> int:
    """Slots of a tile of a cache, where nobody says how many; see `tiles_of`."""
    return DECODING_SLOTS.get(kind.platform or "", tiles_of("xla", kind, head_dim, group).kv)
