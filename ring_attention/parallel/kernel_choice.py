"""The kernel and the tiles of an attention over several devices, chosen where the caller leaves them open."""

from collections.abc import Callable
from typing import Any

import jax

from ring_attention.attention.blocks import BlockSizes, as_blocks
from ring_attention.attention.device_kind import DeviceKind
from ring_attention.attention.kernels.choose import choose_kernel
from ring_attention.attention.kernels.contract import Kernel, require_lse
from ring_attention.attention.kernels.tile_sizes import tiles_of
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.strategy import Context, Strategy


def choose_context(
    strategy: Strategy,
    impl: str,
    block_sizes: BlockSizes | None,
    *,
    axis_name: str,
    layout: SequenceLayout,
    kind: DeviceKind,
    shape: tuple[int, ...],
    return_lse: bool = False,
    dtype: Any,
    kv_heads: int,
    make_mask: Callable[[], MaskSpec],
    choose: Callable[[str, DeviceKind, Callable[[Kernel], None]], Kernel] = choose_kernel,
) -> Context:
    """Make the context of an attention; nothing is traced where the kernel is given by name.

    Args:
      strategy: that brings queries and keys together.
      impl: name of the kernel, or "auto".
      block_sizes: of the kernel's tiles, or None.
      axis_name, layout: as in `Context`.
      kind: of the devices.
      shape: of the queries of one device, [B,t,H,D], where D is the wider of the two head dims.
      return_lse: whether the lse is asked for, too.
      dtype: of the queries.
      kv_heads: K of one device.
      make_mask: makes the mask; it is called by `jax.eval_shape`.
      choose: finds the kernel.

    Raises:
      ValueError: for a name or sizes that do not fit.
    """
    B, t, H, D = shape

    def context_of(kernel: Kernel, blocks: BlockSizes) -> Context:
        return Context(axis_name=axis_name, layout=layout, kernel=kernel, blocks=blocks)

    def accepts(kernel: Kernel) -> None:
        require_lse(kernel, return_lse)
        mask = jax.eval_shape(make_mask)
        kernel.check(mask, jax.ShapeDtypeStruct((B, H, t, D), dtype))
        strategy.check(context_of(kernel, BlockSizes()), shape, kv_heads, mask)

    kernel = choose(impl, kind, accepts)
    require_lse(kernel, return_lse)
    return context_of(kernel, as_blocks(block_sizes, tiles_of(kernel.name, kind, D, H // kv_heads)))
