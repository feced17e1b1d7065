"""The kernel that runs everywhere: tiles of scores in plain XLA, for one block pair.

The G query heads that share a key/value head stand below each other, so that grouped queries are one two-dimensional
product a tile and K and V are never expanded. Tiles that the mask empties are not computed, full ones run without a
mask, and those that it cuts through are computed as smaller ones. Tiles are read from and written to the arrays of the
ring themselves: to loop over heads with `lax.map` would copy each head's part for every block pair.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.kernels.tiling import Tile, Tiling
from ring_attention.attention.masks import BlockPair
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import vary_together
from ring_attention.attention.weights import BlockScores


def forward(q_BHtD, k_BKsD, v_BKsD, pair: BlockPair, state: SoftmaxState, blocks: BlockSizes) -> SoftmaxState:
    """Take the keys of one block pair into the softmax state; see `contract`."""
    t, K = q_BHtD.shape[2], k_BKsD.shape[1]
    tiling = Tiling.of(pair, q_BHtD, k_BKsD, blocks)
    arrays = [tiling.pad_queries(_group(x, K)) for x in (q_BHtD, *state)]
    arrays += [tiling.pad_keys(x) for x in (k_BKsD, v_BKsD)]
    tiling, q, *parts, k, v = vary_together(tiling, *arrays)

    def take_keys(block: BlockScores, q_GtD, k_sD, v_sD, *state_Gt):
        products = jnp.dot(q_GtD.reshape(-1, q_GtD.shape[-1]), k_sD.T, preferred_element_type=jnp.float32)
        scores, _ = block.scores(products.reshape(*q_GtD.shape[:2], -1))
        return tuple(online_softmax.update(SoftmaxState(*state_Gt), scores, v_sD, block.dropout_factor()))

    def begin(row: Tile, state):
        def take(tile: Tile, row_state):
            here = [tile.of_row(x, 2, row) for x in row_state]
            here = _each_head(take_keys, tiling, tile)(tile.of_queries(q), tile.of_keys(k), tile.of_keys(v), *here)
            return [tile.into_row(x, new, 2, row) for x, new in zip(row_state, here, strict=True)]

        return take, [row.of_queries(x) for x in state]

    def end(row: Tile, state, row_state):
        return [row.into_queries(x, new) for x, new in zip(state, row_state, strict=True)]

    return SoftmaxState._make(_ungroup(x[:, :, :, :t]) for x in tiling.each(begin, end, parts))


def backward(q_BHtD, k_BKsD, v_BKsD, stats: GlobalStats, pair: BlockPair, dq_BHtD, blocks: BlockSizes):
    """Gradients of one block pair, given the softmax statistics of all keys; see `contract`.

    dk and dv are summed as [D,s] from queries as [D,r], which are turned once a tile: products whose first factor would
    have to be transposed run at a third of the speed in XLA's CPU compiler (docs/experiments.md).
    """
    t, s, K = q_BHtD.shape[2], k_BKsD.shape[2], k_BKsD.shape[1]
    tiling = Tiling.of(pair, q_BHtD, k_BKsD, blocks)
    # A row that sees nothing has lse -inf; its scores are all hidden, so any finite number will do.
    of_queries = (q_BHtD, stats.dout, online_softmax.finite(stats.lse), stats.delta, dq_BHtD)
    arrays = [tiling.pad_queries(_group(x, K)) for x in of_queries]
    arrays += [tiling.pad_keys(x) for x in (k_BKsD, v_BKsD)]
    arrays += [jnp.zeros_like(_turn(x), jnp.float32) for x in arrays[-2:]]
    tiling, *of_queries, dq, k, v, dk, dv = vary_together(tiling, *arrays)

    def begin(row: Tile, grads):
        q, dout, *statistics = [row.of_queries(x) for x in of_queries]
        turned = [rearrange(x, "h G t D -> h D G t") for x in (q, dout)]

        def add(tile: Tile, grads):
            """Add a tile's part to the dq of this row and to dk and dv."""
            row_dq, *dkv = grads
            here = [tile.of_row(x, 2, row) for x in (q, dout, *statistics)]
            here += [tile.of_row(x, 3, row) for x in turned]
            dq_here, *dkv_here = _each_head(_gradients, tiling, tile)(*here, tile.of_keys(k), tile.of_keys(v))
            row_dq = tile.into_row(row_dq, tile.of_row(row_dq, 2, row) + dq_here, 2, row)
            dkv_here = [tile.of_columns(x) + new for x, new in zip(dkv, dkv_here, strict=True)]
            return [row_dq, *(tile.into_columns(x, new) for x, new in zip(dkv, dkv_here, strict=True))]

        dq, *dkv = grads
        return add, [row.of_queries(dq), *dkv]

    def end(row: Tile, grads, row_grads):
        row_dq, *dkv = row_grads
        return [row.into_queries(grads[0], row_dq), *dkv]

    dq, dk, dv = tiling.each(begin, end, [dq, dk, dv])
    return _ungroup(dq[:, :, :, :t]), _turn(dk)[:, :, :s], _turn(dv)[:, :, :s]


def _gradients(block: BlockScores, q_GtD, dout_GtD, lse_Gt, delta_Gt, q_DGt, dout_DGt, k_sD, v_sD):
    """(dq [G,t,D], dk [D,s], dv [D_v,s]) of one tile."""
    dtype, (G, t, D), (s, D_v) = q_GtD.dtype, q_GtD.shape, v_sD.shape

    def product(x, y):
        return jnp.dot(x, y, preferred_element_type=jnp.float32)

    pairs = ((q_GtD.reshape(-1, D), k_sD), (dout_GtD.reshape(-1, D_v), v_sD))
    products = [product(x, y.T).reshape(G, t, s) for x, y in pairs]
    (scores_Gts, slope), dp_Gts, factor = block.scores(products[0]), products[1], block.dropout_factor()
    p_Gts = jnp.exp(scores_Gts - lse_Gt[..., None])
    counted_Gts = p_Gts if factor is None else p_Gts * factor
    dp_Gts = dp_Gts if factor is None else dp_Gts * factor
    ds_Gts = p_Gts * (dp_Gts - delta_Gt[..., None]) * block.mask.factor
    ds_Gts = ds_Gts if slope is None else ds_Gts * slope
    ds_rs, counted_rs = (x.astype(dtype).reshape(-1, s) for x in (ds_Gts, counted_Gts))
    dk_Ds, dv_Ds = product(q_DGt.reshape(D, -1), ds_rs), product(dout_DGt.reshape(D_v, -1), counted_rs)
    return product(ds_rs, k_sD).reshape(G, t, D), dk_Ds, dv_Ds


def _each_head(fn, tiling: Tiling, tile: Tile):
    """`fn(block, *arrays)` over arrays with a leading axis of key/value heads; batched if there is more than one."""

    def expanded(tree, axes):
        return jax.tree.map(lambda x: jnp.expand_dims(x, axes), tree)

    queries, keys = (expanded(x, axes) for x, axes in zip(tiling.tokens(tile), ((0, 2), (0, 1)), strict=True))
    slopes_hG, heads_hG, batch = tiling.of_heads(tile)

    def one_head(slopes_G, heads_G, *arrays):
        slopes, heads = expanded((slopes_G, heads_G), (1, 2))
        return fn(BlockScores(tiling.pair.mask, queries, keys, slopes, batch, heads, tile.masked), *arrays)

    def every_head(*arrays):
        if tile.heads > 1:
            return jax.vmap(one_head)(slopes_hG, heads_hG, *arrays)
        results = one_head(*jax.tree.map(lambda x: x[0], (slopes_hG, heads_hG, *arrays)))
        return jax.tree.map(lambda x: x[None], results)

    return every_head


def _group(x_BH, num_kv_heads: int):
    return rearrange(x_BH, "B (K G) ... -> B K G ...", K=num_kv_heads)


def _ungroup(x_BKG):
    return rearrange(x_BKG, "B K G ... -> B (K G) ...")


def _turn(x_BKsD):
    return jnp.swapaxes(x_BKsD, 2, 3)
