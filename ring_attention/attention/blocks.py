"""Sizes of the tiles that a kernel works on."""

import dataclasses

from ring_attention.checks import is_whole, require, shown

CHOSEN = -1
"""A size that is left to `attention.kernels.tile_sizes`: chosen for the kernel and the device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """What one tile holds. The defaults suit a CPU; -1 has one chosen for the kernel and the device.

    Attributes:
      q: query tokens.
      kv: key tokens.
      cut: a tile that the mask cuts through is computed as cut x cut smaller ones, without those it leaves empty.
      heads: key/value heads, each with its group of query heads. One head at a time keeps the scores of a tile in a
        CPU's cache (1.5 times the speed of all heads at once, docs/experiments.md); accelerators want as many as fit.
    """

    q: int = 128
    kv: int = 128
    cut: int = 1
    heads: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        wrong = [f"{name}={shown(size)}" for name, size in sizes.items() if not is_whole(size, 1) and size != CHOSEN]
        require(
            not wrong,
            f"block sizes must be whole and positive, got {', '.join(wrong)}; leave them out for the defaults",
        )


def as_blocks(block_sizes: BlockSizes | None, chosen: BlockSizes) -> BlockSizes:
    """The sizes that were asked for, and those of `chosen` for what was left open."""
    fits = block_sizes is None or isinstance(block_sizes, BlockSizes)
    require(fits, f"block_sizes={shown(block_sizes)} must be a BlockSizes; write BlockSizes(q=128, kv=128)")
    if block_sizes is None:
        return chosen
    left_open = {
        name: getattr(chosen, name) for name in ("q", "kv", "cut", "heads") if getattr(block_sizes, name) == CHOSEN
    }
    return dataclasses.replace(block_sizes, **left_open)
