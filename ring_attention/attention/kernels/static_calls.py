"""A block pair by calls of a fused kernel for each of its static tiles, for a kernel that attends to one array of keys.

Such a kernel gives (out, lse) of a tile, in the dtype of q, which are merged in float32. Its backward pass is given the
statistics of all keys, and gives the tile's share of the gradients. What it cannot mask inside of a tile is computed by
the smaller tiles of `xla`.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import xla
from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.kernels.static_tiles import OTHER, StaticTile, plan
from ring_attention.attention.masks import BlockPair
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import vary_together

_log = logging.getLogger(__name__)

UNSEEING = 1e30
"""As lse of a query that sees nothing: every weight is then exp(score - lse) = 0."""


class Calls(NamedTuple):
    """A kernel's calls for one static tile, whose arrays are those of its queries and keys, heads first.

    Attributes:
      name: of the kernel, for the log.
      attention: (q, k, v, part, pair) -> (out [B,H,t,D] in the dtype of q, lse float32 [B,H,t]); `part` is the tile and
        `pair` the tokens in it.
      gradients: (q, out, lse, dout, k, v, part, pair) -> (dq, dk, dv) in the dtype of q, given out and lse of all keys.
      mask: for a kernel that masks within a tile by itself, (part, pair, ascending) -> (mask, holds), where `ascending`
        says that the keys of all tiles stand in the order of their positions. The mask is a further argument of both
        calls; where `holds`, True or a bool of the running program, is not so, `xla` computes the tile. None for a
        kernel that knows whole and causal tiles alone.
    """

    name: str
    attention: Callable
    gradients: Callable
    mask: Callable | None = None


def forward(calls: Calls, q, k, v, pair: BlockPair, state: SoftmaxState, blocks: BlockSizes) -> SoftmaxState:
    """Take the keys of one block pair into the softmax state; see `contract`."""
    q, k, v, pair, state = vary_together(q, k, v, pair, state)

    def fused(part: StaticTile, *mask):
        arrays = _as_wide(part.of_queries(q), part.of_keys(k), part.of_keys(v))
        out, lse = calls.attention(*arrays, part, _pair_of(part, pair), *mask)
        return out[..., : v.shape[-1]], lse

    def tiled(part: StaticTile, *_):
        here = part.of_queries(q)
        empty = SoftmaxState.before(here, v)
        statistics = xla.forward(here, part.of_keys(k), part.of_keys(v), _pair_of(part, pair), empty, blocks)
        out, lse = online_softmax.finalize(statistics)
        return out.astype(q.dtype), lse

    def none(part: StaticTile, *_):
        acc, lowest, _ = SoftmaxState.before(part.of_queries(q), v)
        return acc.astype(q.dtype), lowest

    def attend(part: StaticTile):
        out, lse = _choose(calls, part, pair, fused, tiled, none)
        if pair.mask.seq_len is not None:  # padding sees nothing
            lse = jnp.where(part.of_queries(pair.queries.positions, 1)[:, None] < pair.mask.seq_len, lse, -jnp.inf)
        return out, lse

    def merge(state: SoftmaxState, static_tiles) -> SoftmaxState:
        for part in static_tiles:
            out, lse = attend(part)
            here = online_softmax.merge(jax.tree.map(part.of_queries, state), out.astype(jnp.float32), lse)
            state = jax.tree.map(part.into_queries, state, here)
        return state

    def alone(static_tiles):
        nothing = vary_together(none(StaticTile(0, q.shape[2], 0, 0, OTHER)), q)[0]
        if any(x.shares_queries(y) for x, y in itertools.combinations(static_tiles, 2)):
            out, lse = online_softmax.finalize(merge(SoftmaxState.before(q, v), static_tiles))
            return out.astype(q.dtype), lse
        for part in static_tiles:
            nothing = tuple(map(part.into_queries, nothing, attend(part)))
        return nothing

    plans, number = plan(pair)
    if number is None:
        return merge(state, plans[0])
    out, lse = _branch(plans, number, alone)
    return online_softmax.merge(state, out.astype(jnp.float32), lse)


def backward(calls: Calls, q, k, v, stats: GlobalStats, pair: BlockPair, dq, blocks: BlockSizes):
    """Gradients of one block pair, given the softmax statistics of all keys; see `contract`."""
    q, k, v, pair, stats, dq = vary_together(q, k, v, pair, stats, dq)
    unseeing = stats.lse == -jnp.inf
    if pair.mask.seq_len is not None:  # the lse of padding is that of sinks, where there are any
        unseeing |= pair.queries.positions[:, None] >= pair.mask.seq_len
    lse = jnp.where(unseeing, UNSEEING, stats.lse)

    def fused(part: StaticTile, *mask):
        of_queries, of_keys = map(part.of_queries, (q, stats.out, stats.dout)), map(part.of_keys, (k, v))
        q_here, out, dout, *kv = _as_wide(*of_queries, *of_keys)
        grads = calls.gradients(q_here, out, part.of_queries(lse), dout, *kv, part, _pair_of(part, pair), *mask)
        return tuple(grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True))

    def tiled(part: StaticTile, *_):
        here, q_here = jax.tree.map(part.of_queries, stats), part.of_queries(q)
        nothing = vary_together(jnp.zeros(q_here.shape, jnp.float32), q)[0]
        arrays = (q_here, part.of_keys(k), part.of_keys(v), here, _pair_of(part, pair), nothing)
        return tuple(x.astype(q.dtype) for x in xla.backward(*arrays, blocks))

    def none(part: StaticTile, *_):
        return tuple(map(jnp.zeros_like, (part.of_queries(q), part.of_keys(k), part.of_keys(v))))

    def add(dq, static_tiles):
        dk, dv = (jnp.zeros_like(x, jnp.float32) for x in (k, v))
        for part in static_tiles:
            of_queries, *of_keys = _choose(calls, part, pair, fused, tiled, none)
            dq, dk, dv = part.added_to_queries(dq, of_queries), *map(part.added_to_keys, (dk, dv), of_keys)
        return dq, dk, dv

    def alone(static_tiles):
        return tuple(x.astype(q.dtype) for x in add(jnp.zeros_like(q, jnp.float32), static_tiles))

    plans, number = plan(pair)
    if number is None:
        return add(dq, plans[0])
    here, dk, dv = (x.astype(jnp.float32) for x in _branch(plans, number, alone))
    return dq + here, dk, dv


def _as_wide(*arrays):
    """The arrays, those with narrower heads filled up with zeros: these kernels take one head dim for q, k and v."""
    widest = max(x.shape[-1] for x in arrays)
    return [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, widest - x.shape[-1])]) for x in arrays]


def _branch(plans, number, follow: Callable):
    """`follow(tiles)` of the plan that holds."""
    results = jax.lax.switch(number, [functools.partial(follow, static_tiles) for static_tiles in plans])
    # XLA would move what follows into the branches, and with it the wait for a transfer that they could hide.
    return jax.lax.optimization_barrier(results)


def _choose(calls: Calls, part: StaticTile, pair: BlockPair, fused: Callable, tiled: Callable, none: Callable):
    """What a tile gives: the kernel's result, that of `xla` where it has no such mask, or nothing."""
    by_data = any(x is not None for x in (pair.queries.segments, pair.keys.real))
    mask, holds = (), part.kind != OTHER and not by_data
    if calls.mask is not None:
        mask, holds = calls.mask(part, _pair_of(part, pair), _ascending(pair))
        mask = (mask,)
    if holds is True:
        return fused(part, *mask)
    _say_once(
        f"{calls.name} has no mask for {_unknown_to(calls, part)}: where one crosses a part of a hop, xla computes"
    )
    if holds is False and part.kind == OTHER:
        return tiled(part)
    apart, whole = _by_data(_pair_of(part, pair))
    holds = whole if holds is False else holds
    which = jnp.where(apart, 0, jnp.where(holds, 1, 2))
    return jax.lax.switch(which, [functools.partial(fn, part) for fn in (none, fused, tiled)], *mask)


def _by_data(tile: BlockPair) -> tuple[jax.Array, jax.Array]:
    """Bool (apart, whole): whether segments and padding of keys hide all of a tile, and whether they hide nothing."""
    apart, whole = jnp.bool_(False), jnp.bool_(True)
    queries, keys, real = tile.queries.segments, tile.keys.segments, tile.keys.real
    if queries is not None and keys is not None:
        apart = ((queries.max(1) < keys.min(1)) | (keys.max(1) < queries.min(1))).all()
        whole = ((queries.max(1) == keys.min(1)) & (keys.max(1) == queries.min(1))).all()
    return (apart, whole) if real is None else (apart | ~real.any(), whole & real.all())


def _unknown_to(calls: Calls, part: StaticTile) -> str:
    """What a kernel has no mask for, for the log."""
    if calls.mask is not None:
        return "keys that do not follow each other, as in a segment that comes back"
    return "the end of a window or for padding" if part.kind == OTHER else "a segment's border or padded keys"


def _ascending(pair: BlockPair) -> bool:
    """Whether the keys stand in the order of their positions, on each device that may hold them."""
    runs = pair.keys.runs
    assert runs is not None  # others were refused
    return all(
        first + runs.step * (length - 1) < following
        for starts in runs.starts
        for first, length, following in zip(starts, runs.lengths, starts[1:], strict=False)
    )


@functools.cache
def _say_once(words: str) -> None:
    _log.info("attention kernel: %s", words)


def _pair_of(part: StaticTile, pair: BlockPair) -> BlockPair:
    """The block pair of one tile alone."""
    queries = jax.tree.map(lambda x: part.of_queries(x, 1), pair.queries)
    keys = jax.tree.map(lambda x: part.of_keys(x, 1), pair.keys)
    # Runs are those of all tokens, and say nothing of where a part of them stands.
    return BlockPair(dataclasses.replace(queries, runs=None), dataclasses.replace(keys, runs=None), pair.mask)
