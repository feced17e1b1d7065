import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    NAMES,
    assert_as_exact_as_dense,
    oracle,
    out_and_gradients,
    random_qkv,
    random_segments,
    relative_error,
)

import ring_attention as ra

TILES = ra.BlockSizes(q=24, kv=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_is_as_exact_as_dense_attention_in_the_same_dtype(causal, packed, dtype):
    qkv = random_qkv(0, B=2, T=96, H=6, K=2, D=16, dtype=dtype)
    segments = random_segments(1, 2, 96) if packed else None
    got = out_and_gradients(
        lambda q, k, v: ra.blockwise_attention(q, k, v, causal=causal, segment_ids=segments, block_sizes=TILES), *qkv
    )
    assert_as_exact_as_dense(got, *qkv, causal=causal, segment_ids=segments)


@settings(max_examples=20, deadline=None)
@given(
    T=st.integers(1, 70),
    S=st.integers(1, 70),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 4)]),
    causal=st.booleans(),
    tile=st.sampled_from([7, 16, 512]),
    at_once=st.sampled_from([1, 2]),
    seed=st.integers(0, 999),
)
def test_any_lengths_positions_and_tiles_give_the_oracles_result(T, S, heads, causal, tile, at_once, seed):
    (H, K), rng = heads, np.random.default_rng(seed)
    q, k, v, dout = random_qkv(seed, 2, T, H, K, 8, S=S)
    mask = dict(
        causal=causal,
        segment_ids=rng.integers(0, 3, (2, T)),
        kv_segment_ids=rng.integers(0, 3, (2, S)),
        q_positions=rng.integers(0, 50, T),
        kv_positions=rng.integers(0, 50, (2, S)),
    )
    blocks = ra.BlockSizes(q=tile, kv=tile, heads=at_once)
    got = out_and_gradients(
        lambda q, k, v: ra.blockwise_attention(q, k, v, block_sizes=blocks, **mask),
        *(q, k, v, dout),
    )
    for name, g, w in zip(NAMES, got, oracle(q, k, v, dout, **mask), strict=True):
        np.testing.assert_allclose(np.asarray(g), w, atol=2e-5, err_msg=name)


def test_a_query_that_sees_nothing_gives_zero_and_has_zero_gradients():
    q, k, v, dout = random_qkv(2, B=1, T=32, H=2, K=1, D=8)
    segments = np.array([[7] * 5 + [1] * 27])
    kv_segments = np.array([[1] * 32])
    attend = lambda q, k, v: ra.blockwise_attention(  # noqa: E731
        q, k, v, segment_ids=segments, kv_segment_ids=kv_segments, block_sizes=TILES, return_lse=True
    )
    out, lse = attend(q, k, v)
    _, dq, dk, dv = out_and_gradients(lambda *a: attend(*a)[0], q, k, v, dout)
    assert np.all(np.asarray(out[:, :5]) == 0)
    assert np.all(np.asarray(lse[:, :5]) == -np.inf)
    assert np.all(np.asarray(dq[:, :5]) == 0)
    assert all(np.isfinite(np.asarray(x)).all() for x in (out, dq, dk, dv))
    assert np.abs(np.asarray(dq[:, 5:])).min() > 0  # the control: the other rows do have gradients


def test_lse_is_the_oracles_and_can_be_differentiated():
    q, k, v, _ = random_qkv(3, B=2, T=40, H=4, K=2, D=8)
    weights = np.random.default_rng(4).standard_normal((2, 40, 4))
    _, want = ra.reference_attention(q, k, v, return_lse=True)
    lse = lambda q: ra.blockwise_attention(q, k, v, block_sizes=TILES, return_lse=True)[1]  # noqa: E731
    assert relative_error(lse(q), want) < 1e-6
    direction = np.random.default_rng(5).standard_normal(q.shape)
    shifted = lambda step: np.asarray(q, np.float64) + step * direction  # noqa: E731
    above, below = (ra.reference_attention(shifted(step), k, v, return_lse=True)[1] for step in (1e-3, -1e-3))
    difference = (weights * (above - below)).sum()
    slope = (np.asarray(jax.grad(lambda q: (weights * lse(q)).sum())(q)) * direction).sum()
    assert abs(slope - difference / 2e-3) < 1e-3 * abs(slope)
    assert abs(slope) > 1e-2  # the control: a gradient of zero would not pass


def test_scale_is_honoured():
    q, k, v, _ = random_qkv(6, B=1, T=20, H=2, K=2, D=8)
    got = ra.blockwise_attention(q, k, v, scale=0.5)
    assert relative_error(got, ra.reference_attention(q, k, v, scale=0.5)) < 1e-6
    assert relative_error(got, ra.reference_attention(q, k, v)) > 1e-2


BAD_CALLS = {
    "three axes": (dict(q=(8, 4, 16)), {}, "q has 3 axes"),
    "batch differs": (dict(k=(3, 8, 2, 16), v=(3, 8, 2, 16)), {}, "k has shape (3, 8, 2, 16), need [B=2"),
    "v unlike k": (dict(v=(2, 9, 2, 16)), {}, "v has shape"),
    "heads do not divide": (dict(k=(2, 8, 3, 16), v=(2, 8, 3, 16)), {}, "K must divide H"),
    "integers": (dict(dtype=jnp.int32), {}, "need float32, bfloat16 or float16"),
    "kv segments alone": ({}, dict(kv_segment_ids=jnp.zeros((2, 8), int)), "kv_segment_ids needs segment_ids"),
    "segments of another shape": ({}, dict(segment_ids=jnp.zeros((2, 9), int)), "segment ids of q has shape (2, 9)"),
    "positions of another length": ({}, dict(q_positions=jnp.arange(7)), "q_positions has shape (1, 7)"),
    "unknown kernel": ({}, dict(impl="magic"), "impl='magic' is not known; choose one of 'auto', 'xla'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused_in_words(case):
    shapes, arguments, message = BAD_CALLS[case]
    shapes = dict(q=(2, 8, 4, 16), k=(2, 8, 2, 16), v=(2, 8, 2, 16), dtype=jnp.float32) | shapes
    dtype = shapes.pop("dtype")
    arrays = [jnp.zeros(shape, dtype) for shape in shapes.values()]
    with pytest.raises(ValueError, match=re.escape(message)):
        ra.blockwise_attention(*arrays, **arguments)


def test_dtypes_that_differ_are_refused():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="dtypes float32, bfloat16, float32; cast them"):
        ra.blockwise_attention(q, q.astype(jnp.bfloat16), q)
