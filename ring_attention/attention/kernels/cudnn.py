"""cuDNN's flash attention, as it comes with JAX, as the kernel of a hop.

JAX's own front differentiates one attention from that attention's out and lse. In a ring the backward pass of a hop
needs those of the whole sequence, so this adapter binds the primitives beneath it. It makes a call for each rectangle
of scores that is full or causal (see `rectangles`). What cuDNN does not mask, which is where a segment's border or the
end of a window crosses a rectangle, is computed by the tiles of `xla`. What a hop gives is in the dtype of q, and is
merged with the other hops in float32.

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
from ring_attention.attention.kernels.contract import Kernel, Whole, refuse_unless_bound, require_signature
from ring_attention.attention.kernels.rectangles import CAUSAL, OTHER, Rectangle, plan, plans_of
from ring_attention.attention.masks import Hop
from ring_attention.attention.online_softmax import Running
from ring_attention.attention.rule import Rule
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
"""Of both primitives, in order; the backward one takes `_OF_FORWARD` after them."""

_OF_FORWARD = ("activation", "fwd_output", "grad_output")

_SCORE_MODIFIER = dict(score_mod_name=None, score_mod_jaxpr=None)
"""Settings of the primitives from jax 0.12 on: no function of ours changes the scores."""

UNSEEING = 1e30
"""As lse of a query that sees nothing: every weight is then exp(score - lse) = 0."""


def check(rule: Rule, q) -> None:
    """Raise ValueError for what the kernel cannot do, for queries of this shape [B,H,t,D] and dtype."""
    _require_bindings()
    for name, value in {"softcap": rule.softcap, "alibi_slopes": rule.slopes, "dropout_rate": rule.dropout}.items():
        require(value is None, f'impl="cudnn" has no {name}; leave it out, or use impl="xla"')
    dtype, D = jnp.dtype(q.dtype).name, q.shape[-1]
    require(dtype in ("bfloat16", "float16"), f'impl="cudnn" takes bfloat16 or float16, got {dtype}; use impl="xla"')
    require(
        D % 8 == 0 and D <= 128,
        f'impl="cudnn" takes head dims that are multiples of 8, at most 128, got {D}; use impl="xla"',
    )


def _forward(q, k, v, hop: Hop, running: Running, blocks: BlockSizes) -> Running:
    """Take one hop's keys into the running statistics; see `contract`."""
    q, k, v, hop, running = vary_together(q, k, v, hop, running)

    def fused(part: Rectangle):
        return _attention(part.of_queries(q), part.of_keys(k), part.of_keys(v), hop.rule.scale, part)

    def tiled(part: Rectangle):
        here = part.of_queries(q)
        empty = vary_together(Running.empty(here.shape), q)[0]
        statistics = xla.forward(here, part.of_keys(k), part.of_keys(v), _meeting(part, hop), empty, blocks)
        out, lse = online_softmax.finish(statistics)
        return out.astype(q.dtype), lse

    def none(part: Rectangle):
        rows = part.of_queries(q)
        return jnp.zeros_like(rows), jnp.full_like(rows[..., 0], -jnp.inf, jnp.float32)

    def follow(rectangles):
        found = [(part, *_choose(part, hop, fused, tiled, none)) for part in rectangles]
        if not any(x.shares_queries(y) for x, y in itertools.combinations(rectangles, 2)):
            result = jnp.zeros_like(q), jnp.full_like(q[..., 0], -jnp.inf, jnp.float32)
            for part, *new in found:
                result = tuple(map(part.into_queries, result, new))
            return result
        statistics = vary_together(Running.empty(q.shape), q)[0]
        for part, out, lse in found:
            here = Running(*map(part.of_queries, statistics))
            here = online_softmax.absorb(here, out.astype(jnp.float32), lse)
            statistics = Running(*map(part.into_queries, statistics, here))
        out, lse = online_softmax.finish(statistics)
        return out.astype(q.dtype), lse

    out, lse = _plan_that_holds(hop, follow)
    if hop.rule.seq_len is not None:  # padding sees nothing
        lse = jnp.where(hop.queries.positions[:, None] < hop.rule.seq_len, lse, -jnp.inf)
    return online_softmax.absorb(running, out.astype(jnp.float32), lse)


def _backward(q, k, v, whole: Whole, hop: Hop, dq, blocks: BlockSizes):
    """Gradients of one hop, given the statistics of the whole sequence; see `contract`."""
    q, k, v, hop, whole, dq = vary_together(q, k, v, hop, whole, dq)
    unseeing = whole.lse == -jnp.inf
    if hop.rule.seq_len is not None:  # the lse of padding is that of sinks, where there are any
        unseeing |= hop.queries.positions[:, None] >= hop.rule.seq_len
    lse = jnp.where(unseeing, UNSEEING, whole.lse)

    def fused(part: Rectangle):
        of_queries = [part.of_queries(x) for x in (q, whole.out, lse, whole.dout)]
        return _gradients(*of_queries, part.of_keys(k), part.of_keys(v), hop.rule.scale, part)

    def tiled(part: Rectangle):
        here, q_here = Whole(*map(part.of_queries, whole)), part.of_queries(q)
        nothing = vary_together(jnp.zeros(q_here.shape, jnp.float32), q)[0]
        arrays = (q_here, part.of_keys(k), part.of_keys(v), here, _meeting(part, hop), nothing)
        return tuple(x.astype(q.dtype) for x in xla.backward(*arrays, blocks))

    def none(part: Rectangle):
        return tuple(map(jnp.zeros_like, (part.of_queries(q), part.of_keys(k), part.of_keys(v))))

    def follow(rectangles):
        sums = [jnp.zeros_like(x, jnp.float32) for x in (q, k, v)]
        for part in rectangles:
            of_queries, *of_keys = _choose(part, hop, fused, tiled, none)
            sums = [part.added_to_queries(sums[0], of_queries), *map(part.added_to_keys, sums[1:], of_keys)]
        return tuple(x.astype(q.dtype) for x in sums)

    here, dk, dv = _plan_that_holds(hop, follow)
    return dq + here.astype(jnp.float32), dk.astype(jnp.float32), dv.astype(jnp.float32)


CUDNN = Kernel("cudnn", _forward, _backward, check=check, check_hop=plans_of, platform="gpu", differentiates_lse=False)


def _plan_that_holds(hop: Hop, follow: Callable):
    """`follow(rectangles)` for those that cover what the queries see of the keys."""
    plans, number = plan(hop)
    if number is None:
        return follow(plans[0])
    results = jax.lax.switch(number, [functools.partial(follow, rectangles) for rectangles in plans])
    # XLA would move what follows into the branches, and with it the wait for a transfer that they could hide.
    return jax.lax.optimization_barrier(results)


def _choose(part: Rectangle, hop: Hop, fused: Callable, tiled: Callable, none: Callable):
    """What a rectangle gives: cuDNN's result, that of tiles where it has no such mask, or nothing."""
    if part.mask == OTHER:
        _say_once("cuDNN has no mask for the end of a window or for padding: where one crosses a hop, xla computes")
        return tiled(part)
    if hop.queries.segments is None:
        return fused(part)
    _say_once("cuDNN has no mask for segments: where a border crosses a part of a hop, xla computes that part")
    meeting = _meeting(part, hop)
    queries, keys = (x.segments for x in (meeting.queries, meeting.keys))
    apart = (queries.max(1) < keys.min(1)) | (keys.max(1) < queries.min(1))
    one = (queries.max(1) == keys.min(1)) & (keys.max(1) == queries.min(1))
    which = jnp.where(apart.all(), 0, jnp.where(one.all(), 1, 2))
    return jax.lax.switch(which, [functools.partial(fn, part) for fn in (none, fused, tiled)])


@functools.cache
def _say_once(words: str) -> None:
    _log.info("attention kernel: %s", words)


def _meeting(part: Rectangle, hop: Hop) -> Hop:
    """The hop of a rectangle alone."""
    queries = jax.tree.map(lambda x: x[:, part.q : part.q_end], hop.queries)
    keys = jax.tree.map(lambda x: x[:, part.kv : part.kv_end], hop.keys)
    # Runs are those of all tokens, and say nothing of where a part of them stands.
    return Hop(*(dataclasses.replace(x, runs=None) for x in (queries, keys)), hop.rule)


def _attention(q, k, v, scale: float, part: Rectangle):
    """(out [B,H,t,D] in the dtype of q, lse float32 [B,H,t]) of cuDNN."""
    library, settings = _library(), _settings(scale, part)
    return tuple(library._dot_product_attention_fwd_p.bind(q, k, v, *_unused(q, 7), is_training=True, **settings))


def _gradients(q, out, lse, dout, k, v, scale: float, part: Rectangle):
    """(dq, dk, dv) of cuDNN in the dtype of q, given out and lse of all keys."""
    library, settings = _library(), _settings(scale, part)
    return tuple(library._dot_product_attention_bwd_p.bind(q, k, v, *_unused(q, 7), lse, out, dout, **settings))


def _settings(scale: float, part: Rectangle) -> dict:
    """What both primitives want to know."""
    library = _library()
    return _new_settings() | dict(
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),  # has a bias, wants its gradient
        mask_type=library.MaskType.CAUSAL if part.mask == CAUSAL else library.MaskType.NO_MASK,
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
        settings = _settings(1.0, Rectangle(0, 1, 0, 1, CAUSAL))
        library._dot_product_attention_fwd_p.bind, library._dot_product_attention_bwd_p.bind  # noqa: B018
    except (ImportError, AttributeError) as error:
        refuse_unless_bound("cudnn", False, f"cuDNN module is another: {error}")
    require_signature("cudnn", forward, ["ctx", *_OPERANDS, *settings, "is_training"])
    require_signature("cudnn", backward, ["ctx", *_OPERANDS, *_OF_FORWARD, *settings])


@functools.cache
def _library():
    """JAX's module of the primitives."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
