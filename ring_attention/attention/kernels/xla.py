"""The kernel that runs everywhere: tiles of scores in plain XLA, for one hop.

The G query heads that share a key/value head stand below each other, so that grouped queries are one two-dimensional
product a tile and K and V are never expanded. Tiles that the mask empties are not computed, full ones run without a
mask, and those that it cuts through are computed as smaller ones. Tiles are read from and written to the arrays of the
ring themselves: to loop over heads with `lax.map` would copy each head's part at every hop.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import Whole
from ring_attention.attention.kernels.tiles import Area, Tiles
from ring_attention.attention.masks import Hop
from ring_attention.attention.online_softmax import Running
from ring_attention.attention.varying import vary_together
from ring_attention.attention.weights import Meeting


def forward(q_BHtD, k_BKsD, v_BKsD, hop: Hop, running: Running, blocks: BlockSizes) -> Running:
    """Take one hop's keys into the running statistics; see `contract`."""
    t, K = q_BHtD.shape[2], k_BKsD.shape[1]
    tiles = Tiles.of(hop, q_BHtD, k_BKsD, blocks, by_keys=False)
    arrays = [tiles.pad_queries(_group(x, K)) for x in (q_BHtD, *running)]
    arrays += [tiles.pad_keys(x) for x in (k_BKsD, v_BKsD)]
    tiles, q, *running, k, v = vary_together(tiles, *arrays)

    def query_tile(number, running):
        row = tiles.area(number)

        def take(area: Area, tile):
            """Take the keys of an area into the statistics of this tile."""
            start = area.q - row.q
            here = [area.of_tile(x, 2, start) for x in tile]
            here = _each_head(_take_keys, tiles, area)(area.of_queries(q), area.of_keys(k), area.of_keys(v), *here)
            return [area.into_tile(x, new, 2, start) for x, new in zip(tile, here, strict=True)]

        tile = tiles.visit(row, take, [row.of_queries(x) for x in running])
        return [row.into_queries(x, new) for x, new in zip(running, tile, strict=True)]

    running = lax.fori_loop(0, tiles.number, query_tile, running)
    return Running(*(_ungroup(x[:, :, :, :t]) for x in running))


def _take_keys(meeting: Meeting, q_GtD, k_sD, v_sD, *running_Gt):
    """The statistics with the keys of one area taken in."""
    products = jnp.dot(q_GtD.reshape(-1, q_GtD.shape[-1]), k_sD.T, preferred_element_type=jnp.float32)
    scores, _ = meeting.scores(products.reshape(*q_GtD.shape[:2], -1))
    return tuple(online_softmax.update(Running(*running_Gt), scores, v_sD, meeting.dropout_factor()))


def backward(q_BHtD, k_BKsD, v_BKsD, whole: Whole, hop: Hop, dq_BHtD, blocks: BlockSizes):
    """Gradients of one hop, given the statistics of the whole sequence; see `contract`."""
    t, s, K = q_BHtD.shape[2], k_BKsD.shape[2], k_BKsD.shape[1]
    tiles = Tiles.of(hop, q_BHtD, k_BKsD, blocks, by_keys=True)
    # A row that sees nothing has lse -inf; its scores are all hidden, so any finite number will do.
    of_queries = (q_BHtD, whole.dout, online_softmax.finite(whole.lse), whole.delta, dq_BHtD)
    arrays = [tiles.pad_queries(_group(x, K)) for x in of_queries]
    arrays += [tiles.pad_keys(x) for x in (k_BKsD, v_BKsD)]
    zeros = jnp.zeros(arrays[-1].shape, jnp.float32)
    tiles, q, dout, lse, delta, dq, k, v, dk, dv = vary_together(tiles, *arrays, zeros, zeros)

    def key_tile(number, grads):
        column = tiles.area(number)

        def add(area: Area, grads):
            """Add an area's part to dq and to the dk and dv of this tile."""
            dq, *dkv = grads
            of_queries = [area.of_queries(x) for x in (q, dout, lse, delta)]
            fn = _each_head(_gradients, tiles, area, keys_are_rows=True)
            dq_here, *dkv_here = fn(*of_queries, area.of_keys(k), area.of_keys(v))
            start, added = area.kv - column.kv, []
            for x, here in zip(dkv, dkv_here, strict=True):
                added.append(area.into_tile(x, area.of_tile(x, 1, start) + here, 1, start))
            return [area.into_queries(dq, area.of_queries(dq) + dq_here), *added]

        dq, *dkv = grads
        dq, *tile = tiles.visit(column, add, [dq, *(column.of_keys(x) for x in dkv)])  # dk and dv begin with zeros
        return [dq, *(column.into_keys(x, new) for x, new in zip(dkv, tile, strict=True))]

    dq, dk, dv = lax.fori_loop(0, tiles.number, key_tile, [dq, dk, dv])
    return _ungroup(dq[:, :, :, :t]), dk[:, :, :s], dv[:, :, :s]


def _gradients(meeting: Meeting, q_GtD, dout_GtD, lse_Gt, delta_Gt, k_sD, v_sD):
    """(dq [G,t,D], dk [s,D], dv [s,D]) of one area.

    Its scores have keys as rows, [s,G,t]: of the five products only dq's then has to transpose a tile.
    """
    dtype, (G, t, D), s = q_GtD.dtype, q_GtD.shape, k_sD.shape[0]
    q_rD, dout_rD = q_GtD.reshape(-1, D), dout_GtD.reshape(-1, D)

    def product(x, y):
        return jnp.dot(x, y, preferred_element_type=jnp.float32)

    scores_sGt, slope = meeting.scores(product(k_sD, q_rD.T).reshape(s, G, t))
    p_sGt = jnp.exp(scores_sGt - lse_Gt)
    dp_sGt, factor = product(v_sD, dout_rD.T).reshape(s, G, t), meeting.dropout_factor()
    counted_sGt = p_sGt if factor is None else p_sGt * factor
    dp_sGt = dp_sGt if factor is None else dp_sGt * factor
    ds_sGt = p_sGt * (dp_sGt - delta_Gt) * meeting.rule.scale
    ds_sGt = ds_sGt if slope is None else ds_sGt * slope
    ds_sr = ds_sGt.astype(dtype).reshape(s, -1)
    dv_sD = product(counted_sGt.astype(dtype).reshape(s, -1), dout_rD)
    return product(ds_sr.T, k_sD).reshape(G, t, D), product(ds_sr, q_rD), dv_sD


def _each_head(fn, tiles: Tiles, area: Area, keys_are_rows: bool = False):
    """`fn(meeting, *arrays)` over arrays with a leading axis of key/value heads; batched if there is more than one."""
    q_axes, kv_axes, head_axes = ((0, 1), (1, 2), (0, 2)) if keys_are_rows else ((0, 2), (0, 1), (1, 2))

    def expanded(tree, axes):
        return jax.tree.map(lambda x: jnp.expand_dims(x, axes), tree)

    queries, keys = (expanded(x, axes) for x, axes in zip(tiles.tokens(area), (q_axes, kv_axes), strict=True))
    slopes_hG, heads_hG, batch = tiles.of_heads(area)

    def one_head(slopes_G, heads_G, *arrays):
        slopes, heads = expanded((slopes_G, heads_G), head_axes)
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
