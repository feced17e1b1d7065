"""Tokamax's flash attention, Pallas kernels for NVIDIA's Hopper and Blackwell GPUs, as a kernel.

It takes for each query a range of keys that it sees, and caps scores. So a tile of any mask is
one call (see `static_calls`) wherever what a query sees of it are keys that follow each other; where segments come back
after they ended they may not be, and the smaller tiles of `xla` compute the tile.

Its public front differentiates one attention with that attention's own statistics, so this adapter calls the kernels
beneath it. These are private to Tokamax, and are looked at before they are called: others are refused.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from ring_attention.attention.kernels import static_calls, tokamax_calls
from ring_attention.attention.kernels.contract import Kernel, refuse_in_mask, require_signature
from ring_attention.attention.kernels.cudnn_device import Gpu, gpu_here
from ring_attention.attention.kernels.static_tiles import CAUSAL, OTHER, StaticTile, plans_of
from ring_attention.attention.kernels.tokamax_calls import LARGEST_HEAD_DIM, Setting
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Tokens, visible
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.checks import require

_REMEDY = 'pip install "ring_attention[tokamax]" with Python 3.12 or later, or use impl="xla"'

CAUSAL_CUTS = 2
"""How often a causal tile is cut in two for its gradients: what is hidden is then left out but for 1 / 2 ** CAUSAL_CUTS
of it. The kernels of the backward pass do not skip all of it themselves."""

SMALLEST_CUT = 1024
"""Queries of the smallest causal tile that such cuts leave, but for those that were smaller before."""


def check(mask: MaskSpec, q) -> None:
    """Raise ValueError for what the kernel cannot do, for queries of this shape [B,H,t,D] and dtype."""
    refuse_in_mask("tokamax", mask, "slopes", "dropout", "extra", "kv_bias", "traced_scale")
    dtype, D, generation = jnp.dtype(q.dtype).name, q.shape[-1], _generation(gpu_here(None))
    require(dtype in ("bfloat16", "float16"), f'impl="tokamax" takes bfloat16 or float16, got {dtype}; use impl="xla"')
    largest = LARGEST_HEAD_DIM[generation]
    require(
        D % 8 == 0 and largest >= D,
        f'impl="tokamax" takes head dims that are multiples of 8, at most {largest}, got {D}; use impl="xla"',
    )
    _require_bindings(generation)


def _generation(gpu: Gpu | None) -> int:
    """9 for Hopper, 10 for Blackwell, by the GPU; Hopper without one, where programs are lowered for another device."""
    if gpu is None:
        return 9
    require(
        "cuda" in gpu.stack.lower(),
        f'impl="tokamax" needs CUDA, but the backend is {gpu.stack.strip()!r}; use impl="xla"',
    )
    major = None if gpu.capability is None else gpu.capability[0]
    shown = "one that is not known" if gpu.capability is None else ".".join(map(str, gpu.capability))
    require(
        major in (9, 10),
        f'impl="tokamax" needs a GPU of compute capability 9.x or 10.x, but this is {shown}; use impl="xla"',
    )
    assert major is not None
    return major


@functools.cache
def _require_bindings(generation: int) -> None:
    """Raise ValueError unless Tokamax is there and its kernels take what is given to them here."""
    try:
        forward, backward = _library(generation)
        called = forward.flash_attention_kernel, backward.flash_attention_vjp_kernel
        _ = tokamax_calls.forward_config(forward, generation, 128, False)
        _ = tokamax_calls.backward_config(backward, generation, 128)
    except ImportError as error:
        raise ValueError(f'impl="tokamax" needs the package tokamax, and {error}; {_REMEDY}') from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'impl="tokamax" does not fit the installed tokamax: {error}; {_REMEDY}') from error
    for function, arguments in zip(called, tokamax_calls.ARGUMENTS, strict=True):
        require_signature("tokamax", function, arguments.split())


@functools.cache
def _library(generation: int) -> tuple[Any, Any]:
    """Tokamax's modules of the forward and of the backward pass."""
    name = "tokamax._src.ops.attention.pallas_mosaic_gpu_{}kernel_sm{}0"
    return importlib.import_module(name.format("", generation)), importlib.import_module(
        name.format("vjp_", generation)
    )


def _mask(part: StaticTile, tile: BlockPair, ascending: bool):
    """((first, last), whether that is what is hidden): of each query the range of keys [B or 1, t] that it sees.

    Either is None where a tile's kind says enough. `ascending` says that keys stand in the order of their positions.
    """
    i = jnp.arange(part.rows, dtype=jnp.int32)[None]
    if part.kind == OTHER or any(x is not None for x in (tile.queries.segments, tile.keys.real)):
        return _ranges(tile, ascending)
    return (None if part.window is None else jnp.maximum(i - part.window + 1, 0), None), True


def _ranges(tile: BlockPair, ascending: bool):
    """The same by a look at each pair of tokens, for the keys between the first and the last that a query sees.

    It is one pass over the pairs, for all heads: of 64 it costs as much as a few thousandths of the attention.
    """
    queries, keys = _along(tile.queries, 2), _along(tile.keys, 1)
    seen, s = visible(tile.mask, queries, keys), tile.keys.positions.shape[1]
    shape = jnp.broadcast_shapes(*(x.shape for x in jax.tree.leaves((queries, keys))))
    seen, number = jnp.broadcast_to(True if seen is None else seen, shape), jnp.arange(s, dtype=jnp.int32)
    first, last = jnp.where(seen, number, s).min(2), jnp.where(seen, number + 1, 0).max(2)
    if ascending and queries.segments is None and queries.low is None and keys.real is None:
        return (first, last), True
    number = seen.sum(2, dtype=jnp.int32)
    return (first, last), ((number == 0) | (number == last - first)).all()


def _along(tokens: Tokens, axis: int) -> Tokens:
    """Tokens whose arrays have another axis, so that those of queries and of keys broadcast against each other."""
    return jax.tree.map(lambda x: jnp.expand_dims(x, axis), tokens)


def _attention(q, k, v, part: StaticTile, pair: BlockPair, ranges):
    """(out [B,H,t,D] in the dtype of q, lse float32 [B,H,t]) of one tile."""
    setting = _setting(pair, part.kind == CAUSAL)

    def attend(q, k, v, first, last):
        return tokamax_calls.attend(_attend, q, k, v, first, last, setting)

    return tokamax_calls.over_sequences(attend, (q, k, v), ranges)


def _gradients(q, out, lse, dout, k, v, part: StaticTile, pair: BlockPair, ranges):
    """(dq, dk, dv) of one tile in the dtype of q, given out and lse of all keys."""

    def differentiate(causal):
        def of_heads(q, out, lse, dout, k, v, first, last):
            return tokamax_calls.differentiate(
                _differentiate, q, out, lse, dout, k, v, first, last, _setting(pair, causal)
            )

        return lambda arrays, ranges: tokamax_calls.over_sequences(of_heads, arrays, ranges)

    arrays = (q, out, lse, dout, k, v)
    if part.kind != CAUSAL:
        return differentiate(False)(arrays, ranges)
    cuts = CAUSAL_CUTS
    while cuts and part.rows >> cuts < SMALLEST_CUT:
        cuts -= 1
    found = tokamax_calls.in_triangles(differentiate, arrays, ranges, cuts)
    return tuple(x.astype(q.dtype) for x in found)


def _setting(pair: BlockPair, causal: bool) -> Setting:
    return Setting(causal, pair.mask.scale, pair.mask.softcap)


def _attend(*arrays, setting: Setting):
    """(out [t,H,D], max [H,t], sum [H,t]) by Tokamax, of q [t,H,D], k, v [s,K,D] and the ranges [1,t] or None."""
    gpu = gpu_here(None)
    return tokamax_calls.launch_forward(
        _library(_generation(gpu))[0], _generation(gpu), gpu is not None, arrays, setting
    )


def _differentiate(*arrays, setting: Setting):
    """(dq, dk, dv) by Tokamax, of q, k, v, (max, sum), out, dout and the ranges."""
    generation = _generation(gpu_here(None))
    return tokamax_calls.launch_backward(_library(generation)[1], generation, arrays, setting)


CALLS = static_calls.Calls(
    "tokamax", lambda *args: _attention(*args), lambda *args: _gradients(*args), mask=lambda *args: _mask(*args)
)


def _forward(*args) -> SoftmaxState:
    return static_calls.forward(CALLS, *args)


def _backward(*args):
    return static_calls.backward(CALLS, *args)


TOKAMAX = Kernel(
    "tokamax", _forward, _backward, check=check, check_pair=plans_of, platform="gpu", differentiates_lse=False
)
