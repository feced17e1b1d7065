"""The kernel that runs everywhere: tiles of scores in plain XLA, for one hop.

Query tiles are `r = G*tq` rows: the G query heads that share a key/value head stand below each other, so that grouped
queries are one two-dimensional product per tile and K and V are never expanded. Tiles that the mask empties are not
computed, full ones run without a mask.
"""

import math

import jax.numpy as jnp
from einops import rearrange
from jax import lax

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import Whole
from ring_attention.attention.masks import PADDED_KEY, PADDED_QUERY, Hop, tile_kinds, visible
from ring_attention.attention.online_softmax import Running
from ring_attention.attention.varying import axes_of, vary_over


def forward(q_BtHD, k_BsKD, v_BsKD, hop: Hop, scale: float, blocks: BlockSizes):
    """Attention of one hop and its lse; see `contract`."""
    t, K = q_BtHD.shape[1], k_BsKD.shape[2]
    q_size, kv_size = _tile_size(t, blocks.q), _tile_size(k_BsKD.shape[1], blocks.kv)
    q, k, v = _query_tiles(q_BtHD, K, q_size), _key_tiles(k_BsKD, kv_size), _key_tiles(v_BsKD, kv_size)
    hop = _tile_hop(hop, q_BtHD.shape[0], q_size, kv_size)
    axes = axes_of((q, k, v, hop))

    def one_sequence(args):
        hop, q_KnrD, k_KmsD, v_KmsD = args
        kinds = tile_kinds(hop)

        def one_head(args):
            q_nrD, k_msD, v_msD = args

            def one_query_tile(i):
                def take_keys(j, running):
                    return online_softmax.update(running, _scores(q_nrD[i], k_msD[j], scale), v_msD[j])

                def take_keys_masked(j, running):
                    scores = _hide(_scores(q_nrD[i], k_msD[j], scale), hop, i, j)
                    return online_softmax.update(running, scores, v_msD[j])

                def key_tile(j, running):
                    return _by_kind(kinds[i, j], take_keys_masked, take_keys, j, running)

                start = vary_over(Running.empty(q_nrD.shape[1:]), axes)
                return online_softmax.finish(lax.fori_loop(0, k_msD.shape[0], key_tile, start))

            return lax.map(one_query_tile, jnp.arange(q_nrD.shape[0]))

        return _map(one_head, (q_KnrD, k_KmsD, v_KmsD), blocks.heads)

    out, lse = lax.map(one_sequence, (hop, q, k, v))
    return _from_query_tiles(out, t, q_size), _from_query_tiles(lse[..., None], t, q_size)[..., 0]


def backward(q_BtHD, k_BsKD, v_BsKD, whole: Whole, hop: Hop, scale: float, blocks: BlockSizes):
    """Gradients of one hop, given the statistics of the whole sequence; see `contract`."""
    (B, t, _, _), (_, s, K, _) = q_BtHD.shape, k_BsKD.shape
    q_size, kv_size = _tile_size(t, blocks.q), _tile_size(s, blocks.kv)
    q, dout = _query_tiles(q_BtHD, K, q_size), _query_tiles(whole.dout, K, q_size)
    # A row that sees nothing has lse -inf; its scores are all hidden, so any finite number will do.
    lse = _query_tiles(online_softmax.finite(whole.lse)[..., None], K, q_size)[..., 0]
    delta = _query_tiles(whole.delta[..., None], K, q_size)[..., 0]
    k, v = _key_tiles(k_BsKD, kv_size), _key_tiles(v_BsKD, kv_size)
    hop = _tile_hop(hop, B, q_size, kv_size)
    axes = axes_of((q, k, v, dout, lse, delta, hop))

    def one_sequence(args):
        hop, *arrays = args
        kinds = tile_kinds(hop)

        def one_head(args):
            q_nrD, k_msD, v_msD, dout_nrD, lse_nr, delta_nr = args

            def one_key_tile(dq_nrD, j):
                def add(i, grads, scores_sr):
                    p_sr = jnp.exp(scores_sr - lse_nr[i])
                    return _add_tile(grads, i, p_sr, q_nrD[i], k_msD[j], v_msD[j], dout_nrD[i], delta_nr[i])

                def add_full(i, grads):
                    return add(i, grads, _scores(k_msD[j], q_nrD[i], scale))

                def add_masked(i, grads):
                    return add(i, grads, _hide(_scores(k_msD[j], q_nrD[i], scale), hop, i, j, keys_are_rows=True))

                def query_tile(i, grads):
                    return _by_kind(kinds[i, j], add_masked, add_full, i, grads)

                zero_sD = vary_over(jnp.zeros(k_msD.shape[1:], jnp.float32), axes)
                grads = lax.fori_loop(0, q_nrD.shape[0], query_tile, (dq_nrD, zero_sD, zero_sD))
                return grads[0], grads[1:]

            zero_nrD = vary_over(jnp.zeros(q_nrD.shape, jnp.float32), axes)
            dq_nrD, (dk_msD, dv_msD) = lax.scan(one_key_tile, zero_nrD, jnp.arange(k_msD.shape[0]))
            return dq_nrD * scale, dk_msD * scale, dv_msD

        return _map(one_head, tuple(arrays), blocks.heads)

    dq, dk, dv = lax.map(one_sequence, (hop, q, k, v, dout, lse, delta))
    return _from_query_tiles(dq, t, q_size), _from_key_tiles(dk, s), _from_key_tiles(dv, s)


def _add_tile(grads, i, p_sr, q_rD, k_sD, v_sD, dout_rD, delta_r):
    """Add one tile's part to (dq, dk, dv); dq and dk still lack the factor `scale`.

    p holds the tile's probabilities with keys as rows: of the five products only dq's then has to transpose a tile.
    """
    dq_nrD, dk_sD, dv_sD = grads
    dp_sr = jnp.dot(v_sD, dout_rD.T, preferred_element_type=jnp.float32)
    ds_sr = (p_sr * (dp_sr - delta_r)).astype(q_rD.dtype)
    dv_sD += jnp.dot(p_sr.astype(q_rD.dtype), dout_rD, preferred_element_type=jnp.float32)
    dk_sD += jnp.dot(ds_sr, q_rD, preferred_element_type=jnp.float32)
    dq_nrD = dq_nrD.at[i].add(jnp.dot(ds_sr.T, k_sD, preferred_element_type=jnp.float32))
    return dq_nrD, dk_sD, dv_sD


def _scores(rows_D, columns_D, scale: float):
    """float32 [rows, columns] scores, of queries with keys or of keys with queries."""
    return jnp.dot(rows_D, columns_D.T, preferred_element_type=jnp.float32) * scale


def _hide(scores, hop: Hop, i, j, keys_are_rows: bool = False):
    """Scores of query tile i with key tile j, [r, s] or [s, r], with -inf where the query does not see the key."""
    mask_ts = visible(Hop(hop.queries[i], hop.keys[j], hop.causal))
    if mask_ts is None:
        return scores
    mask = mask_ts.T if keys_are_rows else mask_ts
    group = scores.size // mask.size
    return jnp.where(jnp.tile(mask, (1, group) if keys_are_rows else (group, 1)), scores, -jnp.inf)


def _by_kind(kind, partial, full, index, carry):
    """The carry after a tile of this kind: unchanged if EMPTY, else by `partial` or `full`."""
    return lax.switch(kind, [lambda _, carry: carry, partial, full], index, carry)


def _map(fn, args, at_once: int):
    """lax.map over the leading axis, `at_once` of them together in batched products."""
    together = math.gcd(at_once, args[0].shape[0])
    if together == 1:
        return lax.map(fn, args)
    return lax.map(fn, args, batch_size=together)


def _tile_size(tokens: int, wanted: int) -> int:
    """The size, about `wanted` at most, that cuts `tokens` into equal tiles with little padding (to 8)."""
    tiles = -(-tokens // wanted)
    size = -(-tokens // tiles)
    return size if tokens % size == 0 else -(-size // 8) * 8


def _tile_hop(hop: Hop, batch: int, q_size: int, kv_size: int) -> Hop:
    q_pad, kv_pad = -hop.queries.positions.shape[1] % q_size, -hop.keys.positions.shape[1] % kv_size
    queries, keys = hop.queries, hop.keys
    if q_pad or kv_pad:  # segments on one side need segments on the other
        queries, keys = queries.pad(q_pad, PADDED_QUERY), keys.pad(kv_pad, PADDED_KEY)
    return Hop(queries.tiles(batch, q_size), keys.tiles(batch, kv_size), hop.causal)


def _pad_tokens(x, size: int):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))


def _query_tiles(x_BtHD, num_kv_heads: int, size: int):
    return rearrange(_pad_tokens(x_BtHD, size), "B (n t) (K G) D -> B K n (G t) D", K=num_kv_heads, t=size)


def _from_query_tiles(x_BKnrD, tokens: int, size: int):
    return rearrange(x_BKnrD, "B K n (G t) D -> B (n t) (K G) D", t=size)[:, :tokens]


def _key_tiles(x_BsKD, size: int):
    return rearrange(_pad_tokens(x_BsKD, size), "B (m s) K D -> B K m s D", s=size)


def _from_key_tiles(x_BKmsD, tokens: int):
    return rearrange(x_BKmsD, "B K m s D -> B (m s) K D")[:, :tokens]
