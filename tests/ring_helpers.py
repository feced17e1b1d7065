"""What the tests of attention share: results with gradients of everything, the bound on their errors, and rings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from hypothesis import Phase, settings
from quick_compile import OPTIONS

import ring_attention as ra
from ring_attention.attention import online_softmax
from ring_attention.attention.kernels.contract import Kernel
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.reference import reference_gradients
from ring_attention.attention.weights import BlockScores
from ring_attention.parallel.layouts import as_layout
from ring_attention.testing import NAMES, dense_attention

ALL_NAMES = (*NAMES, "dsinks")

quickly = functools.partial(jax.jit, compiler_options=OPTIONS)
"""`jax.jit` for small programs that run once: the same operations, compiled in half the time or less."""

costly = functools.partial(settings, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
"""`hypothesis.settings` where each example compiles a program: to shrink one that fails would compile hundreds."""


def results(attend, qkv, sinks=None, jit=quickly, **arguments):
    """(out, dq, dk, dv) of attend(q, k, v, **arguments) as one program, and dsinks where there are sinks.

    `qkv` are q, k, v and the cotangent of out. dsinks are [n,H], for n cotangents.
    """

    @jit
    def run(operands, dout):
        return _with_gradients(attend, operands, dout, arguments)

    return _of_cotangents(run, qkv, sinks)


_TRACED = (
    *("window", "stride", "alibi_slopes", "dropout_key"),
    *("segment_ids", "kv_segment_ids", "q_positions", "kv_positions"),
    *("intervals", "kv_valid", "kv_lengths", "kv_bias"),
)
"""Arguments that may be traced. Softcap and scale may, too, but the compiler rounds constants differently."""


def dense_results(qkv, sinks=None, **arguments):
    """What `results` finds of dense attention; masks of the same kinds and shapes share a program."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    masks = {name: arguments.pop(name) for name in _TRACED if name in arguments}
    program = _dense_program(tuple(sorted(arguments.items())))
    return _of_cotangents(functools.partial(program, masks), qkv, sinks)


@functools.cache
def _dense_program(constants):
    return quickly(
        lambda masks, operands, dout: _with_gradients(dense_attention, operands, dout, {**dict(constants), **masks})
    )


def _with_gradients(attend, operands, dout, arguments):
    def fn(q, k, v, sinks=None):
        return attend(q, k, v, **arguments, **({} if sinks is None else dict(sinks=sinks)))

    out, vjp = jax.vjp(fn, *operands)
    return out, *vjp(dout)


def _of_cotangents(run, qkv, sinks):
    *operands, dout = qkv
    if sinks is None:
        return run(operands, dout)
    operands.append(jnp.asarray(sinks, jnp.float32))
    return *run(operands, dout)[:4], np.stack([run(operands, other)[4] for other in _cotangents(dout)])


def expected(qkv, **arguments):
    """What the oracle makes of the same, in float64."""
    q, k, v, dout = qkv
    gradients = reference_gradients(q, k, v, dout, **arguments)
    if arguments.get("sinks") is not None:
        others = [reference_gradients(q, k, v, other, **arguments)[3] for other in _cotangents(dout)]
        gradients = *gradients[:3], np.stack(others)
    return ra.reference_attention(q, k, v, **arguments), *gradients


def _cotangents(dout):
    """The cotangent with other signs, eight times: of one alone H numbers come, which may be close by luck."""
    rng = np.random.default_rng(0)
    return [dout * rng.choice([-1, 1], dout.shape).astype(dout.dtype) for _ in range(8)]


class Bound:
    """Twice the error of dense attention in the dtype of the inputs, in the Euclidean norm, for each result.

    Attributes:
      want: the oracle's results.
      limits: the largest error that each result may have.
    """

    def __init__(self, qkv, **arguments):
        self.want = expected(qkv, **arguments)
        self.limits = [2 * error for error in self._errors(dense_results(qkv, **arguments))]

    def _errors(self, got):
        differences = (np.asarray(g).astype(np.float64) - w for g, w in zip(got, self.want, strict=False))
        return [np.linalg.norm(difference) for difference in differences]

    def too_large(self, got, floor=0.0):
        """The results whose error is not within the bound: {name: error and bound}.

        `floor` is what each entry may be off by in any case, where there are so few that dense may be exact by luck.
        """
        found = {}
        for name, error, limit, want in zip(ALL_NAMES, self._errors(got), self.limits, self.want, strict=False):
            limit = max(limit, floor * want.size**0.5)
            if not error <= limit:  # as it is for NaN
                found[name] = f"error {error:.2e}, bound {limit:.2e}, norm {np.linalg.norm(want):.2e}"
        return found


def assert_exact(got, qkv, floor=0.0, **arguments):
    """Each of `got` is at most twice as far from the oracle as dense attention in the same dtype."""
    assert Bound(qkv, **arguments).too_large(got, floor) == {}


# --- Rings ------------------------------------------------------------------------------------------------------------


def ring_mesh(size):
    return ra.make_mesh(sp=size, devices=jax.devices()[:size])


def sharded(mesh, layout="contiguous", axis_name="sp", **settings):
    """ra.context_attention, by ring unless `strategy` says otherwise, as a function of arrays in natural order."""
    layout = as_layout(layout, mesh.shape[axis_name])
    settings |= dict(mesh=mesh, axis_name=axis_name, layout=layout)

    def attend(q, k, v, **arguments):
        arguments = settings | arguments
        for name in ("segment_ids", "intervals", "kv_valid", "kv_bias"):
            if arguments.get(name) is not None:
                arguments[name] = jax.tree.map(lambda x: layout.permute(x, 1), arguments[name])
        return layout.unpermute(ra.context_attention(*(layout.permute(x, 1) for x in (q, k, v)), **arguments), 1)

    return attend


def simulate(P, qkv, layout="contiguous", segment_ids=None, **arguments):
    """(out, dq, dk, dv) in natural order, from a ring of any size on one device."""
    layout = ra.SequenceLayout(layout, P)

    # JAX cannot batch a custom backward pass that names the axis in a loop, so the gradient is taken on each shard.
    def on_shard(q, k, v, dout, segment_ids):
        attend = functools.partial(ra.ring_attention_shard, segment_ids=segment_ids, layout=layout, **arguments)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    def deal(x):
        return layout.permute(x, 1).reshape(x.shape[0], P, -1, *x.shape[2:])

    in_axes = (1, 1, 1, 1, None if segment_ids is None else 1)
    run = quickly(jax.vmap(on_shard, in_axes=in_axes, out_axes=1, axis_name="sp"))
    got = run(*map(deal, qkv), None if segment_ids is None else deal(segment_ids))
    q, k, v, _ = qkv
    return [layout.unpermute(x.reshape(like.shape), 1) for x, like in zip(got, (q, q, k, v), strict=True)]


# --- A kernel without tiles: what rings do is the same with it, and it compiles in a fifth of the time ----------------


def _forward(q, k, v, pair, state, blocks):
    split, scores, _, factor = _meet(q, k, pair)
    state = jax.vmap(jax.vmap(online_softmax.update))(SoftmaxState(*map(split, state)), scores, v, factor)
    return SoftmaxState(*map(_join, state))


def _backward(q, k, v, stats, pair, dq, blocks):
    split, scores, slope, factor = _meet(q, k, pair)
    lse, delta, dout = online_softmax.finite(split(stats.lse)), split(stats.delta), split(stats.dout)
    p = jnp.exp(scores - lse[..., None])
    dp = _product("bkgtd,bksd->bkgts", dout, v) * factor
    ds = (p * (dp - delta[..., None]) * slope * pair.mask.factor).astype(q.dtype)
    dv = _product("bkgts,bkgtd->bksd", (p * factor).astype(q.dtype), dout)
    return dq + _join(_product("bkgts,bksd->bkgtd", ds, k)), _product("bkgts,bkgtd->bksd", ds, split(q)), dv


PLAIN = Kernel("plain", _forward, _backward, float32_out=True)


def _meet(q, k, pair):
    """(how to split heads into groups, scores [B,K,G,t,s], their slope, what dropout multiplies weights by)."""
    split, mask = functools.partial(rearrange, pattern="B (K G) ... -> B K G ...", K=k.shape[1]), pair.mask
    queries = jax.tree.map(lambda x: x[:, None, None, :, None], pair.queries)
    keys = jax.tree.map(lambda x: x[:, None, None, None, :], pair.keys)
    of_heads = (mask.slopes, None if mask.dropout is None else mask.dropout.heads)
    slopes, heads = jax.tree.map(lambda x: x.reshape(k.shape[1], -1, 1, 1), of_heads)
    batch = None if mask.dropout is None else mask.dropout.batch[:, None, None, None, None]
    block = BlockScores(mask, queries, keys, slopes, batch, heads, masked=True)
    scores, slope = block.scores(_product("bkgtd,bksd->bkgts", split(q), k))
    factor = jnp.ones_like(scores) if mask.dropout is None else block.dropout_factor()
    return split, scores, 1.0 if slope is None else slope, factor


def _join(x):
    return rearrange(x, "B K G ... -> B (K G) ...")


def _product(pattern, x, y):
    return jnp.einsum(pattern, x, y, preferred_element_type=jnp.float32)
