"""The calls of JAX's kernels for TPU that a block pair is cut into, and what each of them must be told.

The kernels count keys from 0. So a block pair is one call for each run of evenly spaced keys (`Tokens.runs`), and
its queries are counted from the first of them. Both are padded to whole tiles: nobody sees a padded key, and what a
padded query gives is dropped.

What is called is private to JAX, and is looked at before it is called: a JAX where it takes other arguments is
refused. So it is imported only where it is used, and a JAX without it still has the other kernels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import DropVar

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import refuse_binding, require_signature
from ring_attention.attention.kernels.splash_memory import LANES, Tiles, max_columns
from ring_attention.attention.masks import EMPTY, BlockPair, Runs, Tokens, tile_kinds, visible
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

TILE_COST = 256
"""What a tile costs beside its tokens, as so many tokens more: a step of the grid, and the rescaling of what was
accumulated. An estimate that nobody has measured."""

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that is not seen; the kernels do not take -inf."""


def check_pair(pair: BlockPair) -> None:
    """Raise ValueError unless the keys are in runs that are known."""
    require(
        pair.keys.runs is not None,
        'impl="splash" needs to know how keys are spaced, and here they are dealt in a way it does not know; use '
        'impl="xla"',
    )


@functools.cache
def require_bindings() -> None:
    """Raise ValueError unless JAX's kernels take what is given to them here."""
    try:
        from jax._src.config import _check_vma  # noqa: F401 (used by launch)

        module = library()
        called = {name: getattr(module, name) for name in _CALLED}
        mask_info = module.mask_info_lib.MaskInfo
    except (ImportError, AttributeError) as error:
        refuse_binding("splash", f"splash attention is another: {error}")
    for name, arguments in _CALLED.items():
        require_signature("splash", called[name], arguments.split())
    require_signature("splash", mask_info, _MASK_INFO)


@functools.cache
def library() -> Any:
    """JAX's module of the kernels."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the kernels: the queries of one sequence, or of all that have the same mask, and a run of keys.

    Attributes:
      start, length: of the run among all keys, static.
      pair: of one sequence, queries and run padded to whole tiles.
      tile_q, tile_kv: sizes, multiples of LANES.
    """

    start: int
    length: int
    pair: BlockPair
    tile_q: int
    tile_kv: int

    @property
    def tiles(self) -> Tiles:
        """The tiles of queries and of the run, padding and all."""
        t, s = (tokens.positions.shape[1] for tokens in (self.pair.queries, self.pair.keys))
        return Tiles(self.tile_q, self.tile_kv, t // self.tile_q, s // self.tile_kv)

    @property
    def capped(self) -> bool:
        """Whether scores are capped."""
        return self.pair.mask.softcap is not None

    def of_queries(self, x_Ht):
        """An array of queries [H,t,...], padded with zeros."""
        return _pad(x_Ht, 1, self.tile_q)

    def of_keys(self, x_Ks):
        """The keys of the run, padded with zeros, of an array [K,s,D]."""
        return _pad(jax.lax.slice_in_dim(x_Ks, self.start, self.start + self.length, axis=1), 1, self.tile_kv)

    def mask_info(self, by_keys: bool) -> tuple:
        """What the library would make of a mask: which tiles to visit and load, and the mask within them or None."""
        queries, keys, runs = self.pair.queries, self.pair.keys, self.pair.keys.runs
        assert runs is not None
        tiles = BlockPair(queries.tiles(self.tile_q), keys.tiles(self.tile_kv), self.pair.mask)
        seen = (tile_kinds(tiles)[0] != EMPTY).astype(jnp.int32)
        loaded = _next_seen(seen, axis=0 if by_keys else 1)
        mask, padded = dataclasses.replace(self.pair.mask, seq_len=None), self.length % self.tile_kv > 0

        def within(q, k):
            seen = visible(mask, Tokens(q), Tokens(k * runs.step))
            real = k < self.length if padded else None
            return functools.reduce(jnp.logical_and, [x for x in (seen, real) if x is not None])

        masked = padded or mask.causal or mask.window is not None or mask.min_distance > 0
        info = library().mask_info_lib.MaskInfo(
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
        if queries.segments is None and keys.real is None and seq_len is None:
            return None

        def of(tokens: Tokens, padding: int):
            segments = jnp.zeros_like(tokens.positions) if tokens.segments is None else tokens.segments
            inside = None if seq_len is None else tokens.positions < seq_len
            for real in (inside, tokens.real):
                segments = segments if real is None else jnp.where(real, segments, padding)
            return segments[0]

        return library().SegmentIds(of(queries, -(2**31) + 1), of(keys, -(2**31)))


def _next_seen(seen: jax.Array, axis: int) -> jax.Array:
    """For each tile the number, along `axis`, of the next that is seen, itself first; 0 where none follows."""
    number, size = jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis), seen.shape[axis]
    following = jax.lax.cummin(jnp.where(seen > 0, number, size), axis, reverse=True)
    return jnp.where(following == size, 0, following)


def calls_for(pair: BlockPair, blocks: BlockSizes) -> Iterator[Call]:
    """The calls for a block pair of one sequence."""
    check_pair(pair)
    tile_q = tile_size(pair.queries.positions.shape[1], blocks.q)
    queries, start = jax.tree.map(lambda x: _pad(x, 1, tile_q, "edge"), pair.queries), 0
    for length in _lengths(pair.keys.runs, blocks, queries.positions.shape[1] // tile_q):
        tile_kv = tile_size(length, blocks.kv)
        run = jax.tree.map(lambda x, first=start, last=start + length: x[:, first:last], pair.keys)
        keys = jax.tree.map(lambda x, size=tile_kv: _pad(x, 1, size, "edge"), run)
        yield Call(start, length, BlockPair(queries, keys, pair.mask), tile_q, tile_kv)
        start += length


def _lengths(runs: Runs | None, blocks: BlockSizes, rows: int) -> Iterator[int]:
    """The numbers of keys of each call: runs that follow each other are one, as far as its table of tiles fits."""
    assert runs is not None
    most, together = max_columns(rows) * tile_size(max(runs.lengths), blocks.kv), 0
    for number, length in enumerate(runs.lengths):
        if together and not (runs.follows(number) and together + length <= most):
            yield together
            together = 0
        together += length
    yield together


def tile_size(tokens: int, wanted: int) -> int:
    """The multiple of LANES, at most `wanted` or LANES, with which `tokens`, padded to whole tiles, cost least."""
    sizes = range(LANES, max(wanted, LANES) + 1, LANES)
    return min(sizes, key=lambda size: (-(-tokens // size) * (size + TILE_COST), -size))


def _pad(x, axis: int, size: int, mode: str = "constant"):
    """The array with its axis padded to a multiple of `size`."""
    widths = [(0, -x.shape[a] % size if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, mode=mode)


def wait(results, after):
    """The results, to be used when `after`, a number that a ring has let wait for its transfers, is there, too.

    None is for results that are made in a loop, where the whole loop would wait and hide nothing; and for hops that are
    as short as their transfers: there the compiler for v4 would end a transfer before the kernels that are to hide it.
    """
    if after is None:
        return results
    *leaves, _ = jax.lax.optimization_barrier(vary_together(*jax.tree.leaves(results), after))
    return jax.tree.unflatten(jax.tree.structure(results), leaves)


def launch(kernel: Callable, arrays: dict, call: Call, products: int, after=None):
    """The results of a library's kernel of `arrays`, by name of argument; `products` for each pair of tokens.

    They are typed as varying like its arrays, which the library's own types leave open. And the compiler is told what
    the kernel costs, which the library leaves open too: with nothing to go by, it starts transfers after kernels that
    would have hidden them. For the same reason what the library does after its kernel, to pick lse out of an array or
    to add up parts of dq, waits with `after` (see `wait`).
    """
    from jax._src.config import _check_vma
    from jax.experimental.pallas import CostEstimate

    def priced(eqn):
        return eqn.replace(params=eqn.params | dict(cost_estimate=cost)) if "cost_estimate" in eqn.params else eqn

    with _check_vma(False):
        jaxpr, shapes = jax.make_jaxpr(lambda arrays: kernel(**arrays), return_shape=True)(arrays)
        cost = CostEstimate(
            flops=products * _pairs(arrays["q"], call) * (arrays["q"].shape[-1] + arrays["v"].shape[-1]),
            transcendentals=_pairs(arrays["q"], call),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, shapes))),
        )
        eqns = [*map(priced, jaxpr.eqns)]
        cut = 1 + next(i for i, eqn in enumerate(eqns) if "cost_estimate" in eqn.params)
        of_kernel = [x for x in eqns[cut - 1].outvars if not isinstance(x, DropVar)]
        before = [x for eqn in eqns[: cut - 1] for x in eqn.outvars if not isinstance(x, DropVar)]
        kernel_alone = jaxpr.jaxpr.replace(eqns=eqns[:cut], outvars=[*before, *of_kernel])
        given = [jaxpr.consts, *jax.tree.leaves(arrays)]
        made = eval_jaxpr(kernel_alone, *given)
    made[len(before) :] = wait(vary_together(made[len(before) :], arrays)[0], after)
    rest = jaxpr.jaxpr.replace(eqns=eqns[cut:], invars=[*jaxpr.jaxpr.invars, *before, *of_kernel])
    results = eval_jaxpr(rest, *given, *made)
    return vary_together(jax.tree.unflatten(jax.tree.structure(shapes), results), arrays)[0]


def _pairs(q, call: Call) -> int:
    """Pairs of a query and a key that a call computes, as if a causal mask showed half of them and a window all."""
    (H, t, _), s = q.shape, call.pair.keys.positions.shape[1]
    return H * t * s // (2 if call.pair.mask.causal else 1)
