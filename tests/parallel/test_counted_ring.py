"""Rings that count their hops as they run: what arrays say is as exact as what is known when a program is traced."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_helpers import Bound, quickly, results

import ring_attention as ra
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import find_kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import Tokens
from ring_attention.parallel.hops import count_hops
from ring_attention.parallel.strategy import Context, ShardTokens
from ring_attention.testing import NAMES, random_qkv

B, H, K, D = 2, 4, 2, 8
CHUNK = 4
"""Tokens of the chunks that are dealt."""
FLOOR = 5e-7
"""What each entry may be off by in any case: of documents of a few tokens dense attention is exact by luck."""


def _mesh(P):
    return ra.make_mesh(sp=P, devices=jax.devices()[:P])


@st.composite
def _documents(draw, T):
    """int32 [B,T]: segment ids of documents of any lengths."""
    rows = []
    for _ in range(B):
        cuts = draw(st.lists(st.integers(1, T - 1), max_size=6))
        rows.append(np.searchsorted(np.sort(cuts), np.arange(T), side="right"))
    return np.stack(rows).astype(np.int32)


@st.composite
def _tables(draw, T):
    """int32 [B,T]: positions of tokens whose chunks are dealt in any order, another one in each row."""
    orders = [draw(st.permutations(range(T // CHUNK))) for _ in range(B)]
    return np.stack([(np.array(order)[:, None] * CHUNK + np.arange(CHUNK)).reshape(-1) for order in orders]).astype(
        np.int32
    )


@st.composite
def _intervals(draw, T):
    """(start, stop), int32 [B,T]: blocks of the sequence, or any intervals, some of which are empty."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    if draw(st.booleans()):
        blocks = ra.Intervals.blocks(rng.integers(-1, 2, (B, T // 2)).repeat(2, 1))
        return tuple(np.asarray(x) for x in blocks)
    start = rng.integers(-2, T, (B, T))
    return start.astype(np.int32), (start + rng.integers(0, T // 4, (B, T))).astype(np.int32)


# --- How far keys travel ----------------------------------------------------------------------------------------------


@functools.cache
def _counter(P, kind, causal):
    context = Context(axis_name="sp", layout=ra.SequenceLayout(kind, P), kernel=find_kernel("xla"), blocks=BlockSizes())

    def on_device(positions, segments, low, high):
        keys = Tokens(positions if kind == "given" else None, segments)
        queries, mask = dataclasses.replace(keys, low=low, high=high), MaskSpec(scale=1.0, causal=causal)
        return count_hops(context, ShardTokens(queries=queries, keys=keys, mask=mask), 8)

    specs = [jax.P(None, "sp")] * 4
    return quickly(jax.shard_map(on_device, mesh=_mesh(P), in_specs=(*specs,), out_specs=jax.P()))


def _fewest_hops(P, positions, segments, causal, low, high):
    """Forth and back together, token by token."""
    device = np.repeat(np.arange(P), positions.shape[1] // P)
    query, key = positions[:, :, None], positions[:, None, :]
    seen = (low[..., None] <= key) & (key < high[..., None])
    seen = (seen | (query >= key) if causal else seen) & (segments[:, :, None] == segments[:, None, :])
    _, query, key = np.nonzero(seen)
    shifts = {int(shift) for shift in (device[query] - device[key]) % P} - {0}
    return min(forth + max((P - shift for shift in shifts if shift > forth), default=0) for forth in range(P))


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "given"])
@pytest.mark.parametrize("causal", [True, False])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_hops_are_the_fewest_that_bring_all_keys(kind, causal, data):
    P, T = 8, 64
    natural = data.draw(_documents(T))
    if kind == "given":
        positions = data.draw(_tables(T))
    else:
        positions = np.tile(ra.SequenceLayout(kind, P).positions(T), (B, 1))
    told = [np.take_along_axis(x, positions, 1) for x in (natural, *data.draw(_intervals(T)))]
    hops = _counter(P, kind, causal)(positions, *told)
    assert int(hops.forth) + int(hops.back) == _fewest_hops(P, positions, told[0], causal, *told[1:])


# --- Results ----------------------------------------------------------------------------------------------------------


def _in_order(x, positions, back=False):
    """x [B,T,...] of natural order as it lies by `positions`, or back."""
    order = jnp.argsort(positions, 1) if back else positions
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)


@functools.cache
def _program(P, strategy, causal, dtype):
    """(q, k, v and dout, what makes results of them by the order in which tokens lie, and positions said of them)."""
    mesh, T = _mesh(P), 8 * P

    def attend(q, k, v, *, lies, positions, told):
        q, k, v, told = jax.tree.map(lambda x: _in_order(x, lies), (q, k, v, told))
        how = dict(mesh=mesh, strategy=strategy, causal=causal, impl="plain" if strategy != "usp" else "xla")
        out = ra.context_attention(q, k, v, positions=positions, **told, **how)
        return _in_order(out, lies, back=True)

    qkv = random_qkv(3, B, T, H, K, D, dtype=dtype)

    @quickly
    def run(qkv, lies, positions, told):
        return results(attend, qkv, jit=lambda fn: fn, lies=lies, positions=positions, told=told)

    return qkv, run


@pytest.mark.parametrize(
    ("P", "strategy", "causal", "dtype"),
    [
        (2, "ring", True, "float32"),
        (3, "ring", False, "bfloat16"),
        (8, "ring", True, "float32"),
        (8, "usp", True, "float32"),
        (2, "all_gather", True, "float32"),
        (2, "ulysses", False, "float32"),
        (2, "ring_self_attention", True, "float32"),
    ],
)
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_positions_that_are_data_give_exact_attention(P, strategy, causal, dtype, data):
    qkv, run = _program(P, strategy, causal, dtype)
    T = qkv[0].shape[1]
    told = dict(segment_ids=data.draw(_documents(T)), intervals=data.draw(_intervals(T)))
    told |= dict(kv_valid=np.random.default_rng(data.draw(st.integers(0, 9))).random((B, T)) < 0.8)
    positions = data.draw(_tables(T))
    got = run(qkv, positions, positions, told)
    assert not Bound(qkv, causal=causal, **told).too_large(got, floor=FLOOR)


def test_a_stale_table_is_seen():
    qkv, run = _program(2, "ring", True, "float32")
    rng, T = np.random.default_rng(0), 16
    table = np.stack([rng.permutation(T // CHUNK) for _ in range(B)])
    segment_ids = np.repeat([[1, 2]], T // 2, 1).repeat(B, 0).astype(np.int32)
    rows = (table[..., None] * CHUNK + np.arange(CHUNK)).reshape(B, T).astype(np.int32)
    told = dict(segment_ids=segment_ids, intervals=ra.Intervals.chunks(np.arange(T)[None].repeat(B, 0), 3))
    told |= dict(kv_valid=np.arange(T)[None].repeat(B, 0) % 7 > 0)
    bound = Bound(qkv, **told)
    assert not bound.too_large(run(qkv, rows, rows, told))
    assert set(bound.too_large(run(qkv, rows, rows[::-1], told))) == set(NAMES)


def test_documents_that_are_dealt_give_exact_attention_in_one_program():
    P, T, programs = 4, 64, []
    mesh, qkv = _mesh(P), random_qkv(4, B, T, H, K, D)

    @jax.jit
    def attend(q, k, v, segment_ids, dealt):
        programs.append(dealt)
        how = dict(mesh=mesh, impl="plain", layout=dealt, segment_ids=dealt.permute(segment_ids))
        return dealt.unpermute(ra.context_attention(*(dealt.permute(x) for x in (q, k, v)), **how))

    for lengths in ([16] * 4, [40, 10, 8, 6], [64]):
        segment_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None].repeat(B, 0)
        dealt = ra.SequenceLayout.for_documents(segment_ids, P, chunks_per_shard=4)
        got = attend(*qkv[:3], segment_ids, dealt)
        assert not Bound(qkv, segment_ids=segment_ids).too_large([got], floor=FLOOR)
    assert len(programs) == 1
