"""The kernel that runs everywhere: tiles of scores in plain XLA, for one hop.

The G query heads that share a key/value head stand below each other, so that grouped queries are one two-dimensional
product a tile and K and V are never expanded. Tiles that the mask empties are not computed, full ones run without a
mask, and those that it cuts through are computed as smaller ones. Tiles are read from and written to the arrays of the
ring themselves: to loop over heads with `lax.map` would copy each head's part at every hop.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import Whole
from ring_attention.attention.kernels.tiles import Area, Tiles, Visits
from ring_attention.attention.masks import Hop
from ring_attention.attention.online_softmax import Running
from ring_attention.attention.varying import vary_together
from ring_attention.attention.weights import Meeting


def forward(q_BHtD, k_BKsD, v_BKsD, hop: Hop, running: Running, blocks: BlockSizes) -> Running:
    """Take one hop's keys into the running statistics; see `contract`."""
    t, K = q_BHtD.shape[2], k_BKsD.shape[1]
    tiles = Tiles.of(hop, q_BHtD, k_BKsD, blocks)
    arrays = [tiles.pad_queries(_group(x, K)) for x in (q_BHtD, *running)]
    arrays += [tiles.pad_keys(x) for x in (k_BKsD, v_BKsD)]
    tiles, q, *running, k, v = vary_together(tiles, *arrays)

    def query_tile(row: Area, visits: Visits, running):
        def take(area: Area, tile):
            """Take the keys of an area into the statistics of this tile."""
            here = [area.of_tile(x, 2, row) for x in tile]
            here = _each_head(_take_keys, tiles, area)(area.of_queries(q), area.of_keys(k), area.of_keys(v), *here)
            return [area.into_tile(x, new, 2, row) for x, new in zip(tile, here, strict=True)]

        tile = tiles.visit(row, visits, take, [row.of_queries(x) for x in running])
        return [row.into_queries(x, new) for x, new in zip(running, tile, strict=True)]

    running = tiles.each(query_tile, running)
    return Running(*(_ungroup(x[:, :, :, :t]) for x in running))


def _take_keys(meeting: Meeting, q_GtD, k_sD, v_sD, *running_Gt):
    """The statistics with the keys of one area taken in."""
    products = jnp.dot(q_GtD.reshape(-1, q_GtD.shape[-1]), k_sD.T, preferred_element_type=jnp.float32)
    scores, _ = meeting.scores(products.reshape(*q_GtD.shape[:2], -1))
    return tuple(online_softmax.update(Running(*running_Gt), scores, v_sD, meeting.dropout_factor()))


def backward(q_BHtD, k_BKsD, v_BKsD, whole: Whole, hop: Hop, dq_BHtD, blocks: BlockSizes):
    """Gradients of one hop, given the statistics of the whole sequence; see `contract`.

    dk and dv are summed as [D,s] from queries as [D,r], which are turned once a tile: products whose first factor would
    have to be transposed run at a third of the speed in XLA's CPU compiler (docs/experiments.md).
    """
    t, s, K = q_BHtD.shape[2], k_BKsD.shape[2], k_BKsD.shape[1]
    tiles = Tiles.of(hop, q_BHtD, k_BKsD, blocks)
    # A row that sees nothing has lse -inf; its scores are all hidden, so any finite number will do.
    of_queries = (q_BHtD, whole.dout, online_softmax.finite(whole.lse), whole.delta, dq_BHtD)
    arrays = [tiles.pad_queries(_group(x, K)) for x in of_queries]
    arrays += [tiles.pad_keys(x) for x in (k_BKsD, v_BKsD)]
    zeros = jnp.zeros_like(_turn(arrays[-1]), jnp.float32)
    tiles, *of_queries, dq, k, v, dk, dv = vary_together(tiles, *arrays, zeros, zeros)

    def query_tile(row: Area, visits: Visits, grads):
        q, dout, *statistics = [row.of_queries(x) for x in of_queries]
        turned = [rearrange(x, "h G t D -> h D G t") for x in (q, dout)]

        def add(area: Area, grads):
            """Add an area's part to the dq of this tile and to dk and dv."""
            tile, *dkv = grads
            here = [area.of_tile(x, 2, row) for x in (q, dout, *statistics)]
            here += [area.of_tile(x, 3, row) for x in turned]
            dq_here, *dkv_here = _each_head(_gradients, tiles, area)(*here, area.of_keys(k), area.of_keys(v))
            tile = area.into_tile(tile, area.of_tile(tile, 2, row) + dq_here, 2, row)
            dkv_here = [area.of_columns(x) + new for x, new in zip(dkv, dkv_here, strict=True)]
            return [tile, *(area.into_columns(x, new) for x, new in zip(dkv, dkv_here, strict=True))]

        dq, *dkv = grads
        tile, *dkv = tiles.visit(row, visits, add, [row.of_queries(dq), *dkv])
        return [row.into_queries(dq, tile), *dkv]

    dq, dk, dv = tiles.each(query_tile, [dq, dk, dv])
    return _ungroup(dq[:, :, :, :t]), _turn(dk)[:, :, :s], _turn(dv)[:, :, :s]


def _gradients(meeting: Meeting, q_GtD, dout_GtD, lse_Gt, delta_Gt, q_DGt, dout_DGt, k_sD, v_sD):
    """(dq [G,t,D], dk [D,s], dv [D,s]) of one area."""
    dtype, (G, t, D), s = q_GtD.dtype, q_GtD.shape, k_sD.shape[0]

    def product(x, y):
        return jnp.dot(x, y, preferred_element_type=jnp.float32)

    products = [product(x.reshape(-1, D), y.T).reshape(G, t, s) for x, y in ((q_GtD, k_sD), (dout_GtD, v_sD))]
    (scores_Gts, slope), dp_Gts, factor = meeting.scores(products[0]), products[1], meeting.dropout_factor()
    p_Gts = jnp.exp(scores_Gts - lse_Gt[..., None])
    counted_Gts = p_Gts if factor is None else p_Gts * factor
    dp_Gts = dp_Gts if factor is None else dp_Gts * factor
    ds_Gts = p_Gts * (dp_Gts - delta_Gt[..., None]) * meeting.rule.scale
    ds_Gts = ds_Gts if slope is None else ds_Gts * slope
    ds_rs, counted_rs = (x.astype(dtype).reshape(-1, s) for x in (ds_Gts, counted_Gts))
    dk_Ds, dv_Ds = product(q_DGt.reshape(D, -1), ds_rs), product(dout_DGt.reshape(D, -1), counted_rs)
    return product(ds_rs, k_sD).reshape(G, t, D), dk_Ds, dv_Ds


def _each_head(fn, tiles: Tiles, area: Area):
    """`fn(meeting, *arrays)` over arrays with a leading axis of key/value heads; batched if there is more than one."""

    def expanded(tree, axes):
        return jax.tree.map(lambda x: jnp.expand_dims(x, axes), tree)

    queries, keys = (expanded(x, axes) for x, axes in zip(tiles.tokens(area), ((0, 2), (0, 1)), strict=True))
    slopes_hG, heads_hG, batch = tiles.of_heads(area)

    def one_head(slopes_G, heads_G, *arrays):
        slopes, heads = expanded((slopes_G, heads_G), (1, 2))
        return fn(Meeting(tiles.hop.rule, queries, keys, slopes, batch, heads, area.masked), *arrays)

    def every_head(*arrays):
        if area.heads > 1:
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
