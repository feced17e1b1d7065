"""Tiles: what is visible is computed once, and not much else is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import quickly

import ring_attention as ra
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import tiling
from ring_attention.attention.kernels.tiling import Tiling
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Tokens, visible

B, H, K, D = 2, 4, 2, 8


def _pair(t, s, segments=False, offset=0, **mask):
    rng = np.random.default_rng(0)
    ids = [np.sort(rng.integers(1, 4, (B, n)), axis=1).astype(np.int32) for n in (t, s)] if segments else (None, None)
    ids = [None if x is None else jnp.asarray(x) for x in ids]
    return BlockPair(
        Tokens(jnp.arange(t)[None] + offset, ids[0]), Tokens(jnp.arange(s)[None], ids[1]), MaskSpec(scale=1.0, **mask)
    )


def _mask(pair, t, s):
    queries = Tokens(*(None if x is None else x[:, :, None] for x in (pair.queries.positions, pair.queries.segments)))
    keys = Tokens(*(None if x is None else x[:, None, :] for x in (pair.keys.positions, pair.keys.segments)))
    mask = visible(pair.mask, queries, keys)
    return np.broadcast_to(True if mask is None else mask, (B, t, s))


def _counts(pair, t, s, blocks):
    """How often each score [B,K,t,s] is computed, and how often without a mask."""
    q, k = jnp.zeros((B, H, t, D)), jnp.zeros((B, K, s, D))
    cut = Tiling.of(pair, q, k, blocks)
    padded = (-(-t // cut.size.q) * cut.size.q, -(-s // cut.size.kv) * cut.size.kv)
    computed, unmasked = np.zeros((2, B, K, *padded), int)

    def take(tile, carry):
        here = (
            int(tile.b),
            slice(int(tile.h), int(tile.h) + tile.heads),
            slice(int(tile.q), int(tile.q) + tile.q_size),
            slice(int(tile.kv), int(tile.kv) + tile.kv_size),
        )
        computed[here] += 1
        unmasked[here] += not tile.masked
        return carry

    class Loop:
        @staticmethod
        def fori_loop(start, stop, body, carry):
            for number in range(int(start), int(stop)):
                carry = body(number, carry)
            return carry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "lax", Loop)
        cut.each(lambda row, carry: (take, carry), lambda row, carry, state: state, 0)
    return computed[:, :, :t, :s], unmasked[:, :, :t, :s]


# Few shapes, as each operation is compiled for each.
CASES = {
    "causal": dict(t=48, s=48),
    "a later shard": dict(t=48, s=48, offset=48),
    "an earlier shard": dict(t=48, s=48, offset=-48),
    "bidirectional": dict(t=48, s=56, causal=False),
    "window": dict(t=48, s=48, window=9),
    "window both ways": dict(t=48, s=56, window=9, causal=False),
    "padding": dict(t=47, s=53, seq_len=21, causal=False),
    "packed": dict(t=48, s=56, segments=True),
    "packed, lengths that tiles do not divide": dict(t=47, s=53, segments=True, window=20),
}


@pytest.mark.parametrize("group", [tiling.GROUP, 2])
@pytest.mark.parametrize("case", CASES)
def test_tiling_computes_what_is_visible_once(case, group, monkeypatch):
    monkeypatch.setattr(tiling, "GROUP", group)
    sizes = dict(CASES[case])
    pair, blocks = _pair(**sizes), BlockSizes(q=16, kv=8, cut=2)
    mask = _mask(pair, sizes["t"], sizes["s"])[:, None]
    computed, unmasked = _counts(pair, sizes["t"], sizes["s"], blocks)
    assert computed.max(initial=0) <= 1
    assert (computed[np.broadcast_to(mask, computed.shape)] == 1).all()
    assert mask[np.broadcast_to(unmasked > 0, unmasked.shape).any(1, keepdims=True)].all()


def test_tiling_of_a_diagonal_wastes_half_a_small_tile_a_row():
    t, blocks = 64, BlockSizes(q=16, kv=16, cut=2)
    computed, _ = _counts(_pair(t, t), t, t, blocks)
    assert computed[0, 0].sum() == t * (t + 8) / 2
    uncut, _ = _counts(_pair(t, t), t, t, BlockSizes(q=16, kv=16, cut=1))
    assert uncut[0, 0].sum() == t * (t + 16) / 2  # the control: tiles that are not cut
    assert _counts(_pair(t, t, offset=-t), t, t, blocks)[0].sum() == 0


@pytest.mark.parametrize("causal", [True, False], ids=["block-causal", "chunks"])
def test_tiling_of_whole_chunks_computes_what_is_visible_alone_and_without_a_mask(causal):
    t, blocks = 64, BlockSizes(q=16, kv=16, cut=2)
    low, high = ra.Intervals.chunks(np.arange(t), 32)
    pair = _pair(t, t, causal=causal)
    pair = dataclasses.replace(pair, queries=dataclasses.replace(pair.queries, low=low, high=high))
    computed, unmasked = _counts(pair, t, t, blocks)
    chunks = np.arange(t) // 32
    seen = chunks[:, None] >= chunks if causal else chunks[:, None] == chunks
    np.testing.assert_array_equal(computed[0, 0], seen)
    np.testing.assert_array_equal(unmasked, computed)


def test_tiling_visits_several_heads_of_a_tile_together():
    together, _ = _counts(_pair(32, 32), 32, 32, BlockSizes(q=16, kv=16, heads=2))
    alone, _ = _counts(_pair(32, 32), 32, 32, BlockSizes(q=16, kv=16))
    np.testing.assert_array_equal(together, alone)


def test_tiling_leaves_out_a_loop_that_visits_nothing():
    x = jax.ShapeDtypeStruct((1, 128, 2, 8), jnp.float32)

    def loops(**positions):
        fn = jax.jit(lambda q, positions: ra.blockwise_attention(q, q, q, **positions))
        return fn.lower(x, positions).compile().as_text().count(" while(")

    assert loops() < loops(q_positions=jax.ShapeDtypeStruct((128,), jnp.int32))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("ring_size", [1, 2])
def test_runs_positions_are_those_of_the_tokens(layout, ring_size):
    dealt = ra.SequenceLayout(layout, ring_size)
    of_all = Tokens(dealt.in_order(dealt.all_positions(12).reshape(1, -1), 1), runs=dealt.all_runs(12))
    of_part = Tokens(dealt.shard_positions(0, 12)[None, 2:9], runs=dealt.runs(12, 2, 9))
    for tokens, told in ((of_all, of_all.runs is not None), (of_part, ring_size == 1 and of_part.runs is not None)):
        known = tokens.known().pad(3)
        assert isinstance(known.positions, np.ndarray) == told
        np.testing.assert_array_equal(known.positions, tokens.pad(3).positions)
        np.testing.assert_array_equal(known.real, tokens.pad(3).real)


def test_blockwise_attention_memory_is_linear_in_length():
    def bytes_of_a_token(T):
        x, ids = jax.ShapeDtypeStruct((1, T, 1, D), "bfloat16"), jax.ShapeDtypeStruct((1, T), "int32")
        loss = lambda q, k, v, ids: ra.blockwise_attention(q, k, v, segment_ids=ids).astype("float32").sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes / T

    assert bytes_of_a_token(2**20) < 1.05 * bytes_of_a_token(2**15)


@pytest.mark.parametrize("size", [8, 32])
def test_blockwise_attention_keeps_nan_in_its_sequence_and_head(size):
    rng, blocks, bad = np.random.default_rng(0), BlockSizes(q=size, kv=size), 20
    q, k, v = (jnp.asarray(rng.standard_normal((B, 32, heads, D)), "float32") for heads in (H, K, K))
    attend = quickly(functools.partial(ra.blockwise_attention, block_sizes=blocks))
    clean = attend(q, k, v)
    out = np.isfinite(attend(q, k, v.at[0, bad, 0].set(jnp.nan)))
    assert not out[0, bad:, : H // K].any()
    assert out[1:].all()
    assert out[:, :, H // K :].all()
    # Hidden numbers of any ordinary size change no bit.
    ids = jnp.where(jnp.arange(32) < bad, 0, 1)[None].repeat(B, 0)
    hidden = [attend(q, k, v.at[:, bad:].set(x), segment_ids=ids) for x in (0, 1e30)]
    np.testing.assert_array_equal(*(x[:, :bad] for x in hidden))
    np.testing.assert_allclose(hidden[0][:, :bad], clean[:, :bad], atol=1e-5)
