"""cuDNN's flash attention, as it comes with JAX, as a kernel.

JAX's own front differentiates one attention from that attention's out and lse. In a ring the backward pass of a
block pair needs those of the whole sequence, so this adapter binds the primitives beneath it. It makes a call for each
tile of scores that is full or causal (see `static_calls`), in the dtype of q. What cuDNN does not mask, which is where
a segment's border or the end of a window crosses a tile, is computed by the smaller tiles of `xla`.

What it binds is private to JAX, and is looked at before it is bound: a JAX where it takes other arguments is refused.
"""

import functools
import inspect

import jax.numpy as jnp

from ring_attention.attention.kernels import static_calls
from ring_attention.attention.kernels.contract import Kernel, refuse_binding, refuse_in_mask, require_signature
from ring_attention.attention.kernels.cudnn_device import gpu_here, require_gpu, require_gradients
from ring_attention.attention.kernels.static_tiles import CAUSAL, StaticTile, plans_of
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.checks import require

_OPERANDS = [
    "query",
    "key",
    "value",
    "bias",
    "q_seqlen",
    "kv_seqlen",
    "q_offsets",
    "kv_offsets",
    "page_table_k",
    "page_table_v",
]
"""Operands of both primitives, in order; the backward one takes `_OF_FORWARD` after them."""

_OF_FORWARD = ("activation", "fwd_output", "grad_output")

_SCORE_MODIFIER = dict(score_mod_name=None, score_mod_jaxpr=None)
"""Settings of the primitives from jax 0.12 on: no function of ours changes the scores."""


def check(mask: MaskSpec, q) -> None:
    """Raise ValueError for what the kernel cannot do, for queries of this shape [B,H,t,D] and dtype."""
    _require_bindings()
    refuse_in_mask("cudnn", mask, "softcap", "slopes", "dropout", "extra", "intervals", "kv_bias", "traced_scale")
    dtype = jnp.dtype(q.dtype).name
    require(dtype in ("bfloat16", "float16"), f'impl="cudnn" takes bfloat16 or float16, got {dtype}; use impl="xla"')
    require_gpu(gpu_here(_library()), q.shape[-1], mask.behind)


def _forward(*args) -> SoftmaxState:
    return static_calls.forward(CALLS, *args)


def _backward(*args):
    require_gradients(gpu_here(_library()))
    return static_calls.backward(CALLS, *args)


CUDNN = Kernel("cudnn", _forward, _backward, check=check, check_pair=plans_of, platform="gpu", differentiates_lse=False)


def _attention(q, k, v, part: StaticTile, pair: BlockPair):
    """(out [B,H,t,D] in the dtype of q, lse float32 [B,H,t]) of cuDNN."""
    library, settings = _library(), _settings(pair.mask.scale, part)
    return tuple(library._dot_product_attention_fwd_p.bind(q, k, v, *_unused(q, 7), is_training=True, **settings))


def _gradients(q, out, lse, dout, k, v, part: StaticTile, pair: BlockPair):
    """(dq, dk, dv) of cuDNN in the dtype of q, given out and lse of all keys."""
    library, settings = _library(), _settings(pair.mask.scale, part)
    return tuple(library._dot_product_attention_bwd_p.bind(q, k, v, *_unused(q, 7), lse, out, dout, **settings))


CALLS = static_calls.Calls("cuDNN", lambda *args: _attention(*args), lambda *args: _gradients(*args))


def _settings(scale: float, part: StaticTile) -> dict:
    """What both primitives want to know."""
    library = _library()
    return _new_settings() | dict(
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),  # has a bias, wants its gradient
        mask_type=library.MaskType.CAUSAL if part.kind == CAUSAL else library.MaskType.NO_MASK,
        layout=library.AttentionLayout.BNTH.value,
        sliding_window_length=part.window,
    )


def _unused(q, number: int):
    """Operands that are not given: a bias, lengths, offsets and page tables."""
    return [jnp.zeros(0, q.dtype)] * number


def _new_settings() -> dict:
    """Those settings that only newer releases of JAX have."""
    known = inspect.signature(_library()._dot_product_attention_fwd_cuda_lowering).parameters
    return {name: value for name, value in _SCORE_MODIFIER.items() if name in known}


@functools.cache
def _require_bindings() -> None:
    """Raise ValueError unless JAX's primitives and their lowerings take what is given to them here."""
    try:
        library = _library()
        forward = library._dot_product_attention_fwd_cuda_lowering
        backward = library._dot_product_attention_bwd_cuda_lowering
        settings = _settings(1.0, StaticTile(0, 1, 0, 1, CAUSAL))
        _ = library._dot_product_attention_fwd_p.bind, library._dot_product_attention_bwd_p.bind
    except (ImportError, AttributeError) as error:
        refuse_binding("cudnn", f"cuDNN module is another: {error}")
    require_signature("cudnn", forward, ["ctx", *_OPERANDS, *settings, "is_training"])
    require_signature("cudnn", backward, ["ctx", *_OPERANDS, *_OF_FORWARD, *settings])


@functools.cache
def _library():
    """JAX's module of the primitives."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
