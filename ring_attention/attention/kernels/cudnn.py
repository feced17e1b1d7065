"""cuDNN's flash attention, as it comes with JAX, as the kernel of a hop.

JAX's own front differentiates one attention from that attention's out and lse. In a ring the backward pass of a hop
needs those of the whole sequence, so this adapter binds the primitives beneath it. It makes a call for each rectangle
of scores that is full or causal (see `rectangles`). What cuDNN does not mask, which is where a segment's border or the
end of a window crosses a rectangle, is computed by the tiles of `xla`. Partial results are in the dtype of q, and
merged in float32.

What it binds is private to JAX and was read in the versions below; another is refused until somebody has looked.
"""

import functools

import jax
import jax.numpy as jnp

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import xla
from ring_attention.attention.kernels.contract import Kernel, Whole, require_version
from ring_attention.attention.kernels.rectangles import CAUSAL, OTHER, Rectangle, plan
from ring_attention.attention.masks import Hop
from ring_attention.attention.online_softmax import Running
from ring_attention.attention.rule import Rule
from ring_attention.attention.varying import vary_together
from ring_attention.checks import require

VERSIONS = ("0.10", "0.11")
"""Of JAX, in which the private functions are as they are used here."""

UNSEEING = 1e30
"""As lse of a query that sees nothing: every weight is then exp(score - lse) = 0."""


def check(rule: Rule, q) -> None:
    """Raise ValueError for what the kernel cannot do, for queries of this shape [B,H,t,D] and dtype."""
    require_version("cudnn", VERSIONS)
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

    def fused(part: Rectangle, running):
        out, lse = _attention(_rows(part, q), _keys(part, k), _keys(part, v), hop.rule.scale, part)
        if hop.rule.seq_len is not None:  # padding sees nothing
            real = hop.queries.positions[:, None, part.q : part.q_end] < hop.rule.seq_len
            lse = jnp.where(real, lse, -jnp.inf)
        new = online_softmax.absorb(Running(*(_rows(part, x) for x in running)), out.astype(jnp.float32), lse)
        return Running(*(_set_rows(part, x, y) for x, y in zip(running, new, strict=True)))

    def tiled(part: Rectangle, running):
        here = Running(*(_rows(part, x) for x in running))
        new = xla.forward(_rows(part, q), _keys(part, k), _keys(part, v), _meeting(part, hop), here, blocks)
        return Running(*(_set_rows(part, x, y) for x, y in zip(running, new, strict=True)))

    return _each_rectangle(hop, running, fused, tiled)


def _backward(q, k, v, whole: Whole, hop: Hop, dq, blocks: BlockSizes):
    """Gradients of one hop, given the statistics of the whole sequence; see `contract`."""
    grads = (dq, jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    q, k, v, hop, whole, grads = vary_together(q, k, v, hop, whole, grads)
    lse = jnp.where(whole.lse == -jnp.inf, UNSEEING, whole.lse)

    def fused(part: Rectangle, grads):
        of_queries = [_rows(part, x) for x in (q, whole.out, lse, whole.dout)]
        here = _gradients(*of_queries, _keys(part, k), _keys(part, v), hop.rule.scale, part)
        return _added(part, grads, *(x.astype(jnp.float32) for x in here))

    def tiled(part: Rectangle, grads):
        here = Whole(*(_rows(part, x) for x in whole))
        nothing = jnp.zeros_like(_rows(part, grads[0]))
        queries, keys = _rows(part, q), (_keys(part, k), _keys(part, v))
        return _added(part, grads, *xla.backward(queries, *keys, here, _meeting(part, hop), nothing, blocks))

    return _each_rectangle(hop, grads, fused, tiled)


CUDNN = Kernel("cudnn", _forward, _backward, check=check, platform="gpu", differentiates_lse=False)


def _each_rectangle(hop: Hop, state, fused, tiled):
    """`fused(rectangle, state)` or `tiled(rectangle, state) -> state` for each rectangle of the plan that holds."""
    plans, number = plan(hop)

    def follow(rectangles, state):
        for part in rectangles:
            if part.mask == OTHER:
                state = tiled(part, state)
            elif hop.queries.segments is None:
                state = fused(part, state)
            else:
                choices = (lambda state: state, functools.partial(fused, part), functools.partial(tiled, part))
                state = jax.lax.switch(_segments_met(part, hop), choices, state)
        return state

    if number is None:
        return follow(plans[0], state)
    state = jax.lax.switch(number, [functools.partial(follow, rectangles) for rectangles in plans], state)
    # XLA would move what follows into the branches, and with it the wait for a transfer that they could hide.
    return jax.lax.optimization_barrier(state)


def _segments_met(part: Rectangle, hop: Hop):
    """0 where no query and key of the rectangle have a segment in common, 1 where all have, 2 otherwise."""
    queries, keys = hop.queries.segments[:, part.q : part.q_end], hop.keys.segments[:, part.kv : part.kv_end]
    apart = (queries.max(1) < keys.min(1)) | (keys.max(1) < queries.min(1))
    one = (queries.max(1) == keys.min(1)) & (keys.max(1) == queries.min(1))
    return jnp.where(apart.all(), 0, jnp.where(one.all(), 1, 2))


def _meeting(part: Rectangle, hop: Hop) -> Hop:
    """The hop of a rectangle alone."""
    queries = jax.tree.map(lambda x: x[:, part.q : part.q_end], hop.queries)
    return Hop(queries, jax.tree.map(lambda x: x[:, part.kv : part.kv_end], hop.keys), hop.rule)


def _rows(part: Rectangle, x):
    """The rectangle's queries of an array [B,H,t,...]."""
    return x[:, :, part.q : part.q_end]


def _keys(part: Rectangle, x):
    """The rectangle's keys of an array [B,K,s,...]."""
    return x[:, :, part.kv : part.kv_end]


def _set_rows(part: Rectangle, x, new):
    return x.at[:, :, part.q : part.q_end].set(new)


def _added(part: Rectangle, grads, dq, dk, dv):
    """The gradients with a rectangle's own added."""
    q, kv = slice(part.q, part.q_end), slice(part.kv, part.kv_end)
    return grads[0].at[:, :, q].add(dq), grads[1].at[:, :, kv].add(dk), grads[2].at[:, :, kv].add(dv)


def _attention(q, k, v, scale: float, part: Rectangle):
    """(out [B,H,t,D] in the dtype of q, lse float32 [B,H,t]) of cuDNN."""
    library, settings = _library(), _settings(scale, part)
    return library._dot_product_attention_fwd_p.bind(q, k, v, *_unused(q, 7), is_training=True, **settings)


def _gradients(q, out, lse, dout, k, v, scale: float, part: Rectangle):
    """(dq, dk, dv) of cuDNN in the dtype of q, given out and lse of all keys."""
    library, settings = _library(), _settings(scale, part)
    return library._dot_product_attention_bwd_p.bind(q, k, v, *_unused(q, 7), lse, out, dout, **settings)


def _settings(scale: float, part: Rectangle) -> dict:
    """What both primitives want to know."""
    library = _library()
    return dict(
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


@functools.cache
def _library():
    """JAX's module of the primitives."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
