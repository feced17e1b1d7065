"""JAX's Pallas kernel for TPU, "splash attention", as a kernel.

The library's own front wants masks known when a program is traced, and in a ring the keys at hand are not. So
this adapter calls the kernels beneath it and gives them, as arrays, what the front would have worked out: which tiles
anybody sees, and where the queries stand (`splash_calls`). Their backward takes statistics of the whole sequence, as a
ring needs. Partial results are in the dtype of q, and merged in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import GlobalStats, Kernel, refuse_in_mask
from ring_attention.attention.kernels.splash_calls import (
    HIDDEN,
    Call,
    calls_for,
    check_pair,
    launch,
    library,
    require_bindings,
    wait,
)
from ring_attention.attention.kernels.splash_memory import fused_groups, require_memory
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.checks import require

LONG_HOPS = 8
"""Query heads to a key/value head from which on what follows the kernels waits for transfers (docs/experiments.md)."""


def check(mask: MaskSpec, q) -> None:
    """Raise ValueError for what the kernel cannot do, for queries of this shape [B,H,t,D] and dtype."""
    require_bindings()
    dtype = jnp.dtype(q.dtype).name
    require(dtype in ("bfloat16", "float32"), f'impl="splash" takes bfloat16 or float32, got {dtype}; use impl="xla"')
    refuse_in_mask("splash", mask, "slopes", "dropout", "extra", "intervals", "kv_bias")


def _each_mask(fn: Callable, pair: BlockPair, after, *arrays):
    """`fn(pair, after, *arrays)` of arrays [B,H,...], in one call where all sequences have the same mask.

    The heads of all of them are then those of one sequence, since the kernels find a query head's keys by division.
    Otherwise sequence after sequence, as a kernel takes one mask.
    """
    B = arrays[0].shape[0]
    if all(x.shape[0] == 1 for x in jax.tree.leaves((pair.queries, pair.keys))):
        results = fn(pair, after, *(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return jax.tree.map(lambda x: x.reshape(B, -1, *x.shape[1:]), results)

    def one(row):
        queries, keys, arrays = row
        queries, keys = jax.tree.map(lambda x: x[None], (queries, keys))
        return fn(BlockPair(queries, keys, pair.mask), None, *arrays)

    return wait(jax.lax.map(one, (pair.queries.of_batch(B), pair.keys.of_batch(B), arrays)), after)


def _forward(q, k, v, pair: BlockPair, state: SoftmaxState, blocks: BlockSizes, interpret: bool = False):
    """Take the keys of one block pair into the softmax state; see `contract`."""
    settings = dict(
        sinks=None,
        mask_value=HIDDEN,
        is_mqa=False,
        residual_checkpoint_name=None,
        save_residuals=True,
        attn_logits_soft_cap=pair.mask.softcap,
        interpret=interpret,
    )

    def one(pair: BlockPair, after, q, k, v):
        found = []
        for call in calls_for(pair, blocks):
            require_memory("forward", call.tiles, _widest(q, v), call.capped)
            info, within = call.mask_info(by_keys=False)
            sizes = library().BlockSizes(block_q=call.tile_q, block_kv=call.tile_kv)
            arrays = dict(fwd_mask_info=info, segment_ids=call.segments())
            arrays |= dict(q=call.of_queries(q), k=call.of_keys(k), v=call.of_keys(v))
            run = functools.partial(
                library()._splash_attention_forward, block_sizes=sizes, mask_function=within, **settings
            )
            out, (lse,) = launch(run, arrays, call, products=2, after=after)
            out, lse = (x[:, : q.shape[1]] for x in (out, lse))
            empty = ~(lse > HIDDEN / 2)  # nothing seen, in a tile that was visited, or in none
            found.append((jnp.where(empty[..., None], 0, out).astype(jnp.float32), jnp.where(empty, -jnp.inf, lse)))
        return found

    after = state.max[0, 0, 0] if _outlasts_transfers(q, k) else None
    for out, lse in _each_mask(one, pair, after, _scaled(q, pair.mask), k, v):
        state = online_softmax.merge(state, out, lse)
    return state


def _backward(q, k, v, stats: GlobalStats, pair: BlockPair, dq, blocks: BlockSizes, interpret: bool = False):
    """Gradients of one block pair, given the softmax statistics of all keys; see `contract`."""

    def one(pair: BlockPair, after, q, k, v, lse, dout, delta):
        of_queries, of_keys = [], []
        for call in calls_for(pair, blocks):
            arrays = dict(k=call.of_keys(k), v=call.of_keys(v), segment_ids=call.segments(), sinks=None)
            rows = dict(q=q, logsumexp=lse, do=dout, di=delta)
            arrays |= {name: call.of_queries(x) for name, x in rows.items()}
            here, *gradients = _gradients(call, arrays, after, interpret)
            of_queries.append(here[:, : q.shape[1]].astype(jnp.float32))
            of_keys.append([x[:, : call.length].astype(jnp.float32) for x in gradients])
        dk, dv = (jnp.concatenate(parts, 1) for parts in zip(*of_keys, strict=True))
        return sum(of_queries) * pair.mask.factor, dk, dv

    # A row that sees nothing has lse -inf; its scores are all hidden, so any finite number will do.
    arrays = (_scaled(q, pair.mask), k, v, online_softmax.finite(stats.lse), stats.dout, stats.delta)
    after = dq[0, 0, 0, 0] if _outlasts_transfers(q, k) else None
    here, dk, dv = _each_mask(one, pair, after, *arrays)
    return dq + here, dk, dv


def _gradients(call: Call, arrays: dict, after, interpret: bool):
    """(dq, dk, dv) of one call, in the dtype of q: by one kernel where that is worth its memory, or by two."""
    by_keys, within = call.mask_info(by_keys=True)
    settings = dict(
        is_mqa=False,
        mask_value=HIDDEN,
        attn_logits_soft_cap=call.pair.mask.softcap,
        interpret=interpret,
        **{f"{x}_layout": library().QKVLayout.HEAD_DIM_MINOR for x in "qkv"},
        bq=call.tile_q,
        bkv=call.tile_kv,
        mask_function=within,
    )
    run = functools.partial(library()._splash_attention_bwd_dkv, bkv_compute=call.tile_kv, **settings)
    widest = _widest(arrays["q"], arrays["v"])
    if groups := fused_groups(call.tiles, widest, arrays["k"].shape[0], call.capped):
        require_memory("fused", call.tiles, widest, call.capped)
        fused = functools.partial(run, use_fused_bwd_kernel=True)

        def in_one(some: dict, after):
            return launch(fused, some | dict(mask_info=by_keys), call, products=5, after=after)

        return _in_groups(groups, in_one, arrays, after)
    require_memory("dq", call.tiles, widest, call.capped)
    require_memory("dkv", call.tiles, widest, call.capped)
    by_queries, _ = call.mask_info(by_keys=False)
    run_dq = functools.partial(library()._splash_attention_bwd_dq, **settings)
    run_dkv = functools.partial(run, use_fused_bwd_kernel=False)
    dq = launch(run_dq, arrays | dict(mask_info=by_queries), call, products=3, after=after)
    _, dk, dv = launch(run_dkv, arrays | dict(mask_info=by_keys), call, products=4, after=after)
    return dq, dk, dv


def _in_groups(groups: int, fn: Callable, arrays: dict, after):
    """`fn(arrays, after)`, whose results have heads first, for one group of heads after another."""
    if groups == 1:
        return fn(arrays, after)
    shared = {name: arrays[name] for name in ("segment_ids", "sinks")}
    of_heads = {name: x.reshape(groups, -1, *x.shape[1:]) for name, x in arrays.items() if name not in shared}
    results = wait(jax.lax.map(lambda some: fn(some | shared, None), of_heads), after)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _outlasts_transfers(q, k) -> bool:
    """Whether hops are long beside their transfers, by the queries that a key/value head serves; see `wait`."""
    return q.shape[1] >= LONG_HOPS * k.shape[1]


def _widest(q, v) -> jax.ShapeDtypeStruct:
    """Queries as wide as the wider of the two head dims, by which the memory of tiles is told."""
    return jax.ShapeDtypeStruct((*q.shape[:-1], max(q.shape[-1], v.shape[-1])), q.dtype)


def _scaled(q, mask: MaskSpec):
    """The kernels do not scale."""
    return (q.astype(jnp.float32) * mask.factor).astype(q.dtype)


SPLASH = Kernel("splash", _forward, _backward, check=check, check_pair=check_pair, platform="tpu", merge_waits=True)
