"""cuDNN's flash attention, as it comes with JAX, as a kernel.

JAX's own front differentiates one attention from that attention's out and lse. In a ring the backward pass of a
block pair needs those of the whole sequence, so this adapter binds the primitives beneath it. It makes a call for each
tile of scores that is full or causal (see `static_tiles`). What cuDNN does not mask, which is where a segment's border
or the end of a window crosses a tile, is computed by the smaller tiles of `xla`. The result of a pair is in the dtype
of q, and is merged with those of the other pairs in float32.

What it binds is private to JAX, and is looked at before it is bound: a JAX where it takes other arguments is refused.
"""

import dataclasses
import functools
import inspect
import itertools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import xla
from ring_attention.attention.kernels.contract import GlobalStats, Kernel, refuse_binding, require_signature
from ring_attention.attention.kernels.cudnn_device import gpu_here, require_gpu, require_gradients
from ring_attention.attention.kernels.static_tiles import CAUSAL, OTHER, StaticTile, plan, plans_of
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import vary_together
from ring_attention.checks import require

_log = logging.getLogger(__name__)

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

UNSEEING = 1e30
"""As lse of a query that sees nothing: every weight is then exp(score - lse) = 0."""


def check(mask: MaskSpec, q) -> None:
    """Raise ValueError for what the kernel cannot do, for queries of this shape [B,H,t,D] and dtype."""
    _require_bindings()
    for name, value in {
        "softcap": mask.softcap,
        "alibi_slopes": mask.slopes,
        "dropout_rate": mask.dropout,
        "extra_mask": mask.extra,
    }.items():
        require(value is None, f'impl="cudnn" has no {name}; leave it out, or use impl="xla"')
    dtype = jnp.dtype(q.dtype).name
    require(dtype in ("bfloat16", "float16"), f'impl="cudnn" takes bfloat16 or float16, got {dtype}; use impl="xla"')
    require_gpu(gpu_here(_library()), q.shape[-1], mask.window)


def _forward(q, k, v, pair: BlockPair, state: SoftmaxState, blocks: BlockSizes) -> SoftmaxState:
    """Take the keys of one block pair into the softmax state; see `contract`."""
    q, k, v, pair, state = vary_together(q, k, v, pair, state)

    def fused(part: StaticTile):
        return _attention(part.of_queries(q), part.of_keys(k), part.of_keys(v), pair.mask.scale, part)

    def tiled(part: StaticTile):
        here = part.of_queries(q)
        empty = vary_together(SoftmaxState.empty(here.shape), q)[0]
        statistics = xla.forward(here, part.of_keys(k), part.of_keys(v), _pair_of(part, pair), empty, blocks)
        out, lse = online_softmax.finalize(statistics)
        return out.astype(q.dtype), lse

    def none(part: StaticTile):
        rows = part.of_queries(q)
        return jnp.zeros_like(rows), jnp.full_like(rows[..., 0], -jnp.inf, jnp.float32)

    def follow(static_tiles):
        found = [(part, *_choose(part, pair, fused, tiled, none)) for part in static_tiles]
        if not any(x.shares_queries(y) for x, y in itertools.combinations(static_tiles, 2)):
            result = jnp.zeros_like(q), jnp.full_like(q[..., 0], -jnp.inf, jnp.float32)
            for part, *new in found:
                result = tuple(map(part.into_queries, result, new))
            return result
        statistics = vary_together(SoftmaxState.empty(q.shape), q)[0]
        for part, out, lse in found:
            here = SoftmaxState(*map(part.of_queries, statistics))
            here = online_softmax.merge(here, out.astype(jnp.float32), lse)
            statistics = SoftmaxState(*map(part.into_queries, statistics, here))
        out, lse = online_softmax.finalize(statistics)
        return out.astype(q.dtype), lse

    out, lse = _plan_that_holds(pair, follow)
    if pair.mask.seq_len is not None:  # padding sees nothing
        lse = jnp.where(pair.queries.positions[:, None] < pair.mask.seq_len, lse, -jnp.inf)
    return online_softmax.merge(state, out.astype(jnp.float32), lse)


def _backward(q, k, v, stats: GlobalStats, pair: BlockPair, dq, blocks: BlockSizes):
    """Gradients of one block pair, given the softmax statistics of all keys; see `contract`."""
    require_gradients(gpu_here(_library()))
    q, k, v, pair, stats, dq = vary_together(q, k, v, pair, stats, dq)
    unseeing = stats.lse == -jnp.inf
    if pair.mask.seq_len is not None:  # the lse of padding is that of sinks, where there are any
        unseeing |= pair.queries.positions[:, None] >= pair.mask.seq_len
    lse = jnp.where(unseeing, UNSEEING, stats.lse)

    def fused(part: StaticTile):
        q_here, out, lse_here, dout = map(part.of_queries, (q, stats.out, lse, stats.dout))
        return _gradients(q_here, out, lse_here, dout, part.of_keys(k), part.of_keys(v), pair.mask.scale, part)

    def tiled(part: StaticTile):
        here, q_here = GlobalStats(*map(part.of_queries, stats)), part.of_queries(q)
        nothing = vary_together(jnp.zeros(q_here.shape, jnp.float32), q)[0]
        arrays = (q_here, part.of_keys(k), part.of_keys(v), here, _pair_of(part, pair), nothing)
        return tuple(x.astype(q.dtype) for x in xla.backward(*arrays, blocks))

    def none(part: StaticTile):
        return tuple(map(jnp.zeros_like, (part.of_queries(q), part.of_keys(k), part.of_keys(v))))

    def follow(static_tiles):
        sums = [jnp.zeros_like(x, jnp.float32) for x in (q, k, v)]
        for part in static_tiles:
            of_queries, *of_keys = _choose(part, pair, fused, tiled, none)
            sums = [part.added_to_queries(sums[0], of_queries), *map(part.added_to_keys, sums[1:], of_keys)]
        return tuple(x.astype(q.dtype) for x in sums)

    here, dk, dv = _plan_that_holds(pair, follow)
    return dq + here.astype(jnp.float32), dk.astype(jnp.float32), dv.astype(jnp.float32)


CUDNN = Kernel("cudnn", _forward, _backward, check=check, check_pair=plans_of, platform="gpu", differentiates_lse=False)


def _plan_that_holds(pair: BlockPair, follow: Callable):
    """`follow(tiles)` for the tiles that cover what the queries see of the keys."""
    plans, number = plan(pair)
    if number is None:
        return follow(plans[0])
    results = jax.lax.switch(number, [functools.partial(follow, static_tiles) for static_tiles in plans])
    # XLA would move what follows into the branches, and with it the wait for a transfer that they could hide.
    return jax.lax.optimization_barrier(results)


def _choose(part: StaticTile, pair: BlockPair, fused: Callable, tiled: Callable, none: Callable):
    """What a tile gives: cuDNN's result, that of `xla` where cuDNN has no such mask, or nothing."""
    if part.kind == OTHER:
        _say_once("cuDNN has no mask for the end of a window or for padding: where one crosses a hop, xla computes")
        return tiled(part)
    if pair.queries.segments is None:
        return fused(part)
    _say_once("cuDNN has no mask for segments: where a border crosses a part of a hop, xla computes that part")
    block = _pair_of(part, pair)
    queries, keys = block.queries.segments, block.keys.segments
    assert queries is not None
    assert keys is not None
    apart = (queries.max(1) < keys.min(1)) | (keys.max(1) < queries.min(1))
    one = (queries.max(1) == keys.min(1)) & (keys.max(1) == queries.min(1))
    which = jnp.where(apart.all(), 0, jnp.where(one.all(), 1, 2))
    return jax.lax.switch(which, [functools.partial(fn, part) for fn in (none, fused, tiled)])


@functools.cache
def _say_once(words: str) -> None:
    _log.info("attention kernel: %s", words)


def _pair_of(part: StaticTile, pair: BlockPair) -> BlockPair:
    """The block pair of one tile alone."""
    queries = jax.tree.map(lambda x: x[:, part.q : part.q_end], pair.queries)
    keys = jax.tree.map(lambda x: x[:, part.kv : part.kv_end], pair.keys)
    # Runs are those of all tokens, and say nothing of where a part of them stands.
    return BlockPair(dataclasses.replace(queries, runs=None), dataclasses.replace(keys, runs=None), pair.mask)


def _attention(q, k, v, scale: float, part: StaticTile):
    """(out [B,H,t,D] in the dtype of q, lse float32 [B,H,t]) of cuDNN."""
    library, settings = _library(), _settings(scale, part)
    return tuple(library._dot_product_attention_fwd_p.bind(q, k, v, *_unused(q, 7), is_training=True, **settings))


def _gradients(q, out, lse, dout, k, v, scale: float, part: StaticTile):
    """(dq, dk, dv) of cuDNN in the dtype of q, given out and lse of all keys."""
    library, settings = _library(), _settings(scale, part)
    return tuple(library._dot_product_attention_bwd_p.bind(q, k, v, *_unused(q, 7), lse, out, dout, **settings))


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
