"""JAX's Pallas kernel for TPU, "splash attention", as a kernel.

The library's own front wants masks known when a program is traced, and in a ring the keys at hand are not. So
this adapter calls the kernels beneath it and gives them, as arrays, what the front would have worked out: which tiles
anybody sees, and where the queries stand. Their backward takes statistics of the whole sequence, as a ring needs.

The kernels count keys from 0. So a block pair is one call for each run of evenly spaced keys (`Tokens.runs`), and
its queries are counted from the first of them. Partial results are in the dtype of q, and merged in float32.

What it calls is private to JAX, and is looked at before it is called: a JAX where it takes other arguments is refused.
So it is imported only where it is used, and a JAX without it still has the other kernels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import GlobalStats, Kernel, refuse_binding, require_signature
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import EMPTY, BlockPair, Tokens, tile_kinds, visible
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import vary_together
from ring_attention.checks import require

_CALLED = {
    "_splash_attention_forward": "fwd_mask_info q k v segment_ids sinks mask_value is_mqa block_sizes "
    "residual_checkpoint_name save_residuals mask_function attn_logits_soft_cap interpret",
    "_splash_attention_bwd_dq": "q k v segment_ids sinks logsumexp do di bq bkv is_mqa mask_info mask_value "
    "attn_logits_soft_cap q_layout k_layout v_layout mask_function interpret",
    "_splash_attention_bwd_dkv": "q k v segment_ids sinks logsumexp do di bq bkv bkv_compute is_mqa mask_info "
    "mask_value attn_logits_soft_cap use_fused_bwd_kernel q_layout k_layout v_layout mask_function interpret",
    "SegmentIds": "q kv",
}
"""What is called of JAX's module, and with which arguments."""

_MASK_INFO = ("data_next", "mask_next", "block_mask", "partial_mask_blocks", "q_sequence")

LANES = 128
"""Tiles are multiples of this."""

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that is not seen; the kernels do not take -inf."""


def check(mask: MaskSpec, q) -> None:
    """Raise ValueError for what the kernel cannot do, for queries of this shape [B,H,t,D]."""
    _require_bindings()
    for name, value in {"alibi_slopes": mask.slopes, "dropout_rate": mask.dropout, "extra_mask": mask.extra}.items():
        require(value is None, f'impl="splash" has no {name}; leave it out, or use impl="xla"')
    require(
        q.shape[2] % LANES == 0,
        f'impl="splash" works on tiles of {LANES} tokens, but a shard has {q.shape[2]}; pad the sequence, or use '
        'impl="xla"',
    )


def check_pair(pair: BlockPair) -> None:
    """Raise ValueError unless the keys are in runs that are known."""
    require(
        pair.keys.runs is not None,
        'impl="splash" needs to know how keys are spaced, and here they are dealt in a way it does not know; use '
        'impl="xla"',
    )


@functools.cache
def _require_bindings() -> None:
    """Raise ValueError unless JAX's kernels take what is given to them here."""
    try:
        from jax._src.config import _check_vma  # noqa: F401 (used by _launch)

        library = _library()
        called = {name: getattr(library, name) for name in _CALLED}
        mask_info = library.mask_info_lib.MaskInfo
    except (ImportError, AttributeError) as error:
        refuse_binding("splash", f"splash attention is another: {error}")
    for name, arguments in _CALLED.items():
        require_signature("splash", called[name], arguments.split())
    require_signature("splash", mask_info, _MASK_INFO)


@functools.cache
def _library() -> Any:
    """JAX's module of the kernels."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of the kernels: the queries of one sequence and a run of keys.

    Attributes:
      start, length: of the run among all keys, static.
      pair: of one sequence, the run padded to a multiple of the tile.
      tile_q, tile_kv: sizes.
    """

    start: int
    length: int
    pair: BlockPair
    tile_q: int
    tile_kv: int

    def of_keys(self, x_Ks):
        """The keys of the run, padded, of an array [K,s,D]."""
        x_Ks = jax.lax.slice_in_dim(x_Ks, self.start, self.start + self.length, axis=1)
        return jnp.pad(x_Ks, ((0, 0), (0, -self.length % LANES), (0, 0)))

    def mask_info(self, by_keys: bool) -> tuple:
        """What the library would make of a mask: which tiles to visit and load, and the mask within them or None."""
        queries, keys, runs = self.pair.queries, self.pair.keys, self.pair.keys.runs
        assert runs is not None
        tiles = BlockPair(queries.tiles(self.tile_q), keys.tiles(self.tile_kv), self.pair.mask)
        seen = (tile_kinds(tiles)[0] != EMPTY).astype(jnp.int32)
        loaded = _next_seen(seen, axis=0 if by_keys else 1)
        mask, padded = dataclasses.replace(self.pair.mask, seq_len=None), self.length % LANES > 0

        def within(q, k):
            seen = visible(mask, Tokens(q), Tokens(k * runs.step))
            real = k < self.length if padded else None
            return functools.reduce(jnp.logical_and, [x for x in (seen, real) if x is not None])

        masked = padded or mask.causal or mask.window is not None or mask.min_distance > 0
        info = _library().mask_info_lib.MaskInfo(
            data_next=loaded[None],
            mask_next=None,
            block_mask=seen[None],
            partial_mask_blocks=None,
            q_sequence=queries.positions[0] - keys.positions[0, 0] if masked else None,
        )
        return info, within if masked else None

    def segments(self):
        """Segments of both, those of padding unlike any other; None where there are none."""
        queries, keys, seq_len = self.pair.queries, self.pair.keys, self.pair.mask.seq_len
        if queries.segments is None and seq_len is None:
            return None

        def of(tokens: Tokens, padding: int):
            segments = jnp.zeros_like(tokens.positions) if tokens.segments is None else tokens.segments
            return segments[0] if seq_len is None else jnp.where(tokens.positions < seq_len, segments, padding)[0]

        return _library().SegmentIds(of(queries, -(2**31) + 1), of(keys, -(2**31)))


def _next_seen(seen: jax.Array, axis: int) -> jax.Array:
    """For each tile the number, along `axis`, of the next that is seen, itself first; 0 where none follows."""
    number, size = jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis), seen.shape[axis]
    following = jax.lax.cummin(jnp.where(seen > 0, number, size), axis, reverse=True)
    return jnp.where(following == size, 0, following)


def _calls(pair: BlockPair, blocks: BlockSizes) -> Iterator[_Call]:
    """The calls for a block pair of one sequence."""
    check_pair(pair)
    assert pair.keys.runs is not None
    start = 0
    for length in pair.keys.runs.lengths:
        padding = -length % LANES
        run = jax.tree.map(lambda x, first=start, last=start + length: x[:, first:last], pair.keys)
        keys = jax.tree.map(lambda x, more=padding: jnp.pad(x, ((0, 0), (0, more)), mode="edge"), run)
        sizes = _tile(pair.queries.positions.shape[1], blocks.q), _tile(length + padding, blocks.kv)
        yield _Call(start, length, BlockPair(pair.queries, keys, pair.mask), *sizes)
        start += length


def _tile(tokens: int, wanted: int) -> int:
    """The largest multiple of LANES that divides `tokens` and is at most `wanted`, or LANES."""
    return max(size for size in range(LANES, max(wanted, LANES) + 1, LANES) if tokens % size == 0)


def _each_sequence(fn: Callable, pair: BlockPair, *arrays):
    """`fn(pair, *arrays)` for each sequence of the batch, whose mask may be another."""
    B = arrays[0].shape[0]
    queries, keys = pair.queries.of_batch(B), pair.keys.of_batch(B)
    if B == 1:
        results = fn(pair, *(x[0] for x in arrays))
        return jax.tree.map(lambda x: x[None], results)

    def one(row):
        queries, keys, arrays = row
        queries, keys = jax.tree.map(lambda x: x[None], (queries, keys))
        return fn(BlockPair(queries, keys, pair.mask), *arrays)

    return jax.lax.map(one, (queries, keys, arrays))


def _launch(kernel: Callable, arrays: dict, call: _Call, products: int):
    """The results of a library's kernel of `arrays`, by name of argument; `products` for each pair of tokens.

    They are typed as varying like its arrays, which the library's own types leave open. And the compiler is told what
    the kernel costs, which the library leaves open too: with nothing to go by, it starts transfers after kernels that
    would have hidden them.
    """
    from jax._src.config import _check_vma
    from jax.experimental.pallas import CostEstimate

    def priced(eqn):
        return eqn.replace(params=eqn.params | dict(cost_estimate=cost)) if "cost_estimate" in eqn.params else eqn

    with _check_vma(False):
        jaxpr, shapes = jax.make_jaxpr(lambda arrays: kernel(**arrays), return_shape=True)(arrays)
        cost = CostEstimate(
            flops=2 * products * _pairs(arrays["q"], call) * arrays["q"].shape[-1],
            transcendentals=_pairs(arrays["q"], call),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, shapes))),
        )
        jaxpr_with_prices = jaxpr.jaxpr.replace(eqns=[*map(priced, jaxpr.eqns)])
        results = eval_jaxpr(jaxpr_with_prices, jaxpr.consts, *jax.tree.leaves(arrays))
    return vary_together(jax.tree.unflatten(jax.tree.structure(shapes), results), arrays)[0]


def _pairs(q, call: _Call) -> int:
    """Pairs of a query and a key that a call computes, as if a causal mask showed half of them and a window all."""
    (H, t, _), s = q.shape, call.pair.keys.positions.shape[1]
    return H * t * s // (2 if call.pair.mask.causal else 1)


def _forward(q, k, v, pair: BlockPair, state: SoftmaxState, blocks: BlockSizes, interpret: bool = False):
    """Take the keys of one block pair into the softmax state; see `contract`."""
    library = _library()
    settings = dict(
        sinks=None,
        mask_value=HIDDEN,
        is_mqa=False,
        residual_checkpoint_name=None,
        save_residuals=True,
        attn_logits_soft_cap=pair.mask.softcap,
        interpret=interpret,
    )

    def one(pair: BlockPair, q, k, v):
        found = []
        for call in _calls(pair, blocks):
            info, within = call.mask_info(by_keys=False)
            sizes = library.BlockSizes(block_q=call.tile_q, block_kv=call.tile_kv)
            arrays = dict(fwd_mask_info=info, q=q, k=call.of_keys(k), v=call.of_keys(v), segment_ids=call.segments())
            run = functools.partial(
                library._splash_attention_forward, block_sizes=sizes, mask_function=within, **settings
            )
            out, (lse,) = _launch(run, arrays, call, products=2)
            empty = ~(lse > HIDDEN / 2)  # nothing seen, in a tile that was visited, or in none
            found.append((jnp.where(empty[..., None], 0, out).astype(jnp.float32), jnp.where(empty, -jnp.inf, lse)))
        return found

    for out, lse in _each_sequence(one, pair, _scaled(q, pair.mask), k, v):
        state = online_softmax.merge(state, out, lse)
    return state


def _backward(q, k, v, stats: GlobalStats, pair: BlockPair, dq, blocks: BlockSizes, interpret: bool = False):
    """Gradients of one block pair, given the softmax statistics of all keys; see `contract`."""
    library = _library()
    settings = dict(
        is_mqa=False,
        mask_value=HIDDEN,
        attn_logits_soft_cap=pair.mask.softcap,
        interpret=interpret,
        **{f"{x}_layout": library.QKVLayout.HEAD_DIM_MINOR for x in "qkv"},
    )

    def one(pair: BlockPair, q, k, v, lse, dout, delta):
        of_queries, of_keys = [], []
        for call in _calls(pair, blocks):
            (by_queries, within), (by_keys, _) = call.mask_info(by_keys=False), call.mask_info(by_keys=True)
            arrays = dict(q=q, k=call.of_keys(k), v=call.of_keys(v), segment_ids=call.segments(), sinks=None)
            arrays |= dict(logsumexp=lse, do=dout, di=delta)
            same = settings | dict(bq=call.tile_q, bkv=call.tile_kv, mask_function=within)
            run_dq = functools.partial(library._splash_attention_bwd_dq, **same)
            run_dkv = functools.partial(
                library._splash_attention_bwd_dkv, bkv_compute=call.tile_kv, use_fused_bwd_kernel=False, **same
            )
            here = _launch(run_dq, arrays | dict(mask_info=by_queries), call, products=3)
            of_queries.append(here.astype(jnp.float32))
            _, dk, dv = _launch(run_dkv, arrays | dict(mask_info=by_keys), call, products=4)
            of_keys.append([x[:, : call.length].astype(jnp.float32) for x in (dk, dv)])
        dk, dv = (jnp.concatenate(parts, 1) for parts in zip(*of_keys, strict=True))
        return sum(of_queries) * pair.mask.scale, dk, dv

    # A row that sees nothing has lse -inf; its scores are all hidden, so any finite number will do.
    arrays = (_scaled(q, pair.mask), k, v, online_softmax.finite(stats.lse), stats.dout, stats.delta)
    here, dk, dv = _each_sequence(one, pair, *arrays)
    return dq + here, dk, dv


def _scaled(q, mask: MaskSpec):
    """The kernels do not scale."""
    return (q.astype(jnp.float32) * mask.scale).astype(q.dtype)


SPLASH = Kernel("splash", _forward, _backward, check=check, check_pair=check_pair, platform="tpu", merge_waits=True)
