import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ring_helpers import ALL_NAMES, Bound, costly, expected, quickly, results

import ring_attention as ra
from ring_attention.testing import random_qkv, random_segments, relative_error

T, S, H, K, D = 44, 60, 6, 2, 16
KEY = jax.random.key(7)
SINKS = np.array([0.7, -1.2, 0.1, 1.0, 2.0, -0.5])
SLOPES = 0.3 * 2.0 ** -np.arange(6)
DROPOUT = dict(dropout_rate=0.3, dropout_key=KEY)
CROSS = dict(  # queries among the last keys, and more documents than theirs
    segment_ids=random_segments(1, 2, T, count=3) + 1,
    kv_segment_ids=random_segments(2, 2, S, count=4),
    q_positions=np.arange(T) + 16,
    kv_positions=np.stack([np.arange(S), np.arange(S) + 3]),
)
RICH = dict(window=21, softcap=2.0, scale=0.4, sinks=SINKS, alibi_slopes=SLOPES, **DROPOUT)

# Which arguments, keys, tiles. Neither 44 nor 60 is a multiple of most of these tiles.
CASES = {
    "causal": ({}, T, dict(q=24, kv=16)),
    "both ways": (dict(causal=False), S, dict(q=24, kv=16, cut=1)),
    "documents, softcap": (dict(segment_ids=random_segments(3, 2, T), softcap=0.7), T, dict(q=24, kv=16, heads=2)),
    "documents of others, scale": (CROSS | dict(scale=-0.6), S, dict(q=17, kv=13)),
    "window, sinks": (dict(window=9, sinks=SINKS), T, dict(q=7, kv=5)),
    "window both ways": (dict(window=13, causal=False), S, dict(q=16, kv=16, cut=4)),
    "alibi, softcap both ways": (dict(alibi_slopes=SLOPES, softcap=0.7, causal=False), S, dict(q=13, kv=60)),
    "everything": (dict(**RICH, segment_ids=random_segments(4, 2, T, count=2)), T, dict(q=24, kv=16, heads=2)),
    "everything, of others": (RICH | CROSS | dict(causal=False), S, dict(q=10, kv=24, cut=1)),
}
DOCUMENTS, IMAGES = (
    random_segments(5, 2, T, count=3),
    np.random.default_rng(6).integers(-1, 2, (2, T // 4)).repeat(4, 1),
)
PREFIX = ra.Intervals.prefix(np.random.default_rng(7).random((2, T)) < 0.4, DOCUMENTS)
BIAS = np.random.default_rng(8).normal(0, 2, (2, S)).astype(np.float32)
BIAS[:, 3::7] = -np.inf
CASES |= {
    "prefixes of documents, lengths": (
        dict(segment_ids=DOCUMENTS, intervals=PREFIX, kv_lengths=np.array([40, 23])),
        T,
        dict(q=24, kv=16),
    ),
    "images in a window, some keys": (
        dict(window=5, intervals=ra.Intervals.blocks(IMAGES), kv_valid=np.arange(2 * T).reshape(2, T) % 11 > 1),
        T,
        dict(q=7, kv=5),
    ),
    "chunks in a window of two sides, bias": (
        dict(causal=False, window=(11, 4), intervals=ra.Intervals.chunks(np.arange(T), 10), kv_bias=BIAS, softcap=0.9),
        S,
        dict(q=13, kv=16, heads=2),
    ),
}
HALF = [("everything", "bfloat16"), ("everything, of others", "float16"), ("images in a window, some keys", "bfloat16")]
TOGETHER = [("segment_ids", "kv_segment_ids"), ("dropout_rate", "dropout_key"), ("q_positions", "kv_positions")]


@pytest.mark.parametrize(("case", "dtype"), [*((case, "float32") for case in CASES), *HALF])
def test_blockwise_attention_is_as_exact_as_dense_attention(case, dtype):
    arguments, keys, sizes = CASES[case]
    qkv = random_qkv(0, 2, T, H, K, D, dtype=dtype, S=keys)
    bound = Bound(qkv, **arguments)
    got = results(ra.blockwise_attention, qkv, block_sizes=ra.BlockSizes(**sizes), **arguments)
    assert [x.dtype for x in got[:4]] == [dtype] * 4
    assert bound.too_large(got) == {}
    for name in arguments:  # the control: an argument that is not honoured
        dropped = {name, *(other for pair in TOGETHER if name in pair for other in pair)}
        rest = {name: value for name, value in arguments.items() if name not in dropped}
        assert bound.too_large([ra.reference_attention(*qkv[:3], **rest)]), name
    if "intervals" in arguments:
        start, stop = arguments["intervals"]
        wrongs = [(start, stop - 1)] + [(start + 1, stop)] * ("window" in arguments)  # causal shows the start, too
        for wrong in wrongs:  # the control: intervals that are off by one
            assert bound.too_large([ra.reference_attention(*qkv[:3], **arguments | dict(intervals=wrong))])


@pytest.mark.slow
@costly(max_examples=8)
@given(
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 4)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 60) | st.tuples(*2 * [st.none() | st.integers(0, 60)]),
    softcap=st.none() | st.just(1.5),
    rate=st.sampled_from([0.0, 0.4]),
    has=st.fixed_dictionaries(dict(sinks=st.booleans(), alibi_slopes=st.booleans())),
    told=st.sets(st.sampled_from(["intervals", "kv_valid", "kv_lengths", "kv_bias"])),
    tile=st.sampled_from([7, 16, 512]),
    cut_and_heads=st.sampled_from([(1, 1), (2, 2), (4, 1)]),
    seed=st.integers(0, 999),
)
def test_blockwise_attention_matches_oracle_with_any_lengths(
    lengths, heads, causal, window, softcap, rate, has, told, tile, cut_and_heads, seed
):
    (T, S), (H, K), rng = lengths, heads, np.random.default_rng(seed)
    qkv = random_qkv(seed, 2, T, H, K, 8, S=S)
    arguments = dict(
        causal=causal,
        window=window,
        softcap=softcap,
        segment_ids=rng.integers(0, 3, (2, T)),
        kv_segment_ids=rng.integers(0, 3, (2, S)),
        q_positions=rng.integers(0, 50, T),
        kv_positions=rng.integers(0, 50, (2, S)),
        dropout_rate=rate,
        dropout_key=KEY,
        **{name: rng.standard_normal(H) for name in has if has[name]},
    )
    start = rng.integers(0, 50, (1, T))
    of_tokens = dict(
        intervals=(start, start + rng.integers(0, 20, (1, T))),
        kv_valid=rng.random((2, S)) < 0.7,
        kv_lengths=rng.integers(0, 50, 2),
        kv_bias=rng.normal(0, 2, (2, S)).astype(np.float32),
    )
    arguments |= {name: of_tokens[name] for name in told}
    cut, at_once = cut_and_heads
    blocks = ra.BlockSizes(q=tile, kv=tile, cut=cut, heads=at_once)
    got = results(ra.blockwise_attention, qkv, block_sizes=blocks, **arguments)
    for name, g, w in zip(ALL_NAMES, got, expected(qkv, **arguments), strict=False):
        np.testing.assert_allclose(np.asarray(g), w, atol=3e-5, err_msg=name)


@pytest.mark.parametrize(("causal", "sizes"), [(True, dict(q=16, kv=8, heads=2)), (False, dict(q=7, kv=5, cut=1))])
def test_blockwise_attention_drops_the_same_with_any_tiles(causal, sizes):
    length = 33
    q, k, _, _ = random_qkv(1, 2, length, 4, 2, length)
    v = jnp.broadcast_to(jnp.eye(length)[:, None], k.shape)  # the output of a query is then its row of weights
    want = ra.reference_attention(q, k, v, causal=causal, **DROPOUT)
    seen = ra.reference_attention(q, k, v, causal=causal) > 0
    assert 0.25 < 1 - (want > 0).sum() / seen.sum() < 0.35  # of those seen, about the rate is dropped
    blocks = ra.BlockSizes(**sizes)
    got = quickly(functools.partial(ra.blockwise_attention, causal=causal, block_sizes=blocks, **DROPOUT))(q, k, v)
    np.testing.assert_array_equal(np.asarray(got) > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_blockwise_attention_takes_slopes_and_biases_as_constants():
    q, k, v, dout = random_qkv(6, 1, 20, 2, 1, 8)

    def loss(slopes, bias):
        return jnp.vdot(dout, ra.blockwise_attention(q, k, v, alibi_slopes=slopes, kv_bias=bias))

    run, bias = quickly(jax.value_and_grad(loss, (0, 1))), np.zeros((1, 20), np.float32)
    value, grads = run(jnp.array([0.5, 0.1]), bias)
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)
    for others in ((jnp.array([0.6, 0.1]), bias), (jnp.array([0.5, 0.1]), bias + np.arange(20) % 3)):
        assert abs(value - run(*others)[0]) > 1e-3  # the control: they do count


# --- Rows that see nothing --------------------------------------------------------------------------------------------

# Of 32 queries the first five see nothing, because of documents, or because of how far they stand from all keys.
NOTHING = {
    "other documents": dict(segment_ids=np.array([[7] * 5 + [1] * 27]), kv_segment_ids=np.array([[1] * 32])),
    "before all keys": dict(q_positions=np.arange(32) - 5),
    "out of the window": dict(window=33, q_positions=np.r_[[70] * 5, 5:32], causal=False),
}


@pytest.mark.parametrize(
    ("why", "sinks"),
    [("other documents", None), ("before all keys", np.array([0.5, -1.0])), ("out of the window", None)],
    ids=NOTHING,
)
def test_blockwise_attention_is_zero_where_a_query_sees_nothing(why, sinks):
    q, k, v, dout = random_qkv(2, B=1, T=32, H=2, K=1, D=8)

    @quickly
    def run(q, k, v, sinks, dout):
        def attend(q, k, v, sinks):
            blocks = ra.BlockSizes(q=24, kv=16)
            return ra.blockwise_attention(q, k, v, sinks=sinks, block_sizes=blocks, return_lse=True, **NOTHING[why])

        (out, lse), vjp = jax.vjp(attend, q, k, v, sinks)
        return out, lse, vjp((dout, jnp.zeros_like(lse)))

    with jax.debug_nans(True):
        out, lse, (dq, dk, dv, dsinks) = run(q, k, v, sinks, dout)
        *_, (_, *of_nothing) = run(q, k, v, sinks, dout.at[:, 5:].set(0))
    assert np.all(np.asarray(out[:, :5]) == 0)
    np.testing.assert_array_equal(lse[0, :5], np.full((5, 2), -np.inf if sinks is None else sinks, np.float32))
    assert np.all(np.asarray(dq[:, :5]) == 0)
    assert all(np.all(np.asarray(x) == 0) for x in of_nothing if x is not None)
    # The control: the other rows do have gradients.
    others = (dq[:, 5:], dk, dv) if sinks is None else (dq[:, 5:], dk, dv, dsinks)
    assert all(np.isfinite(np.asarray(x)).all() and np.abs(np.asarray(x)).max() > 1e-3 for x in others)


# --- The log-sum-exp --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, dict(sinks=SINKS[:4], window=9, softcap=2.0, **DROPOUT)], ids=["", "rich"])
def test_blockwise_attention_lse_matches_oracle_with_gradients(arguments):
    q, k, v, _ = random_qkv(3, B=2, T=40, H=4, K=2, D=8)
    weights = np.random.default_rng(4).standard_normal((2, 40, 4))

    @quickly
    def run(q):
        def lse(q):
            return ra.blockwise_attention(q, k, v, return_lse=True, **arguments)[1]

        value, vjp = jax.vjp(lse, q)
        return value, vjp(jnp.asarray(weights, jnp.float32))[0]

    def difference(step):
        moved = np.asarray(q, np.float64) + step * direction
        return ra.reference_attention(moved, k, v, return_lse=True, **arguments)[1]

    got, dq = run(q)
    _, want = ra.reference_attention(q, k, v, return_lse=True, **arguments)
    assert relative_error(got, want) < 1e-6
    direction = np.random.default_rng(5).standard_normal(q.shape)
    slope = (np.asarray(dq) * direction).sum()
    assert abs(slope - (weights * (difference(1e-3) - difference(-1e-3))).sum() / 2e-3) < 1e-3 * abs(slope)
    assert abs(slope) > 1e-2  # the control: a gradient of zero would not pass


# --- What is refused --------------------------------------------------------------------------------------------------

BAD_CALLS = {
    "three axes": (dict(q=(8, 4, 16)), {}, "q has 3 axes"),
    "batch differs": (dict(k=(3, 8, 2, 16), v=(3, 8, 2, 16)), {}, "k has shape (3, 8, 2, 16), need [B=2"),
    "v unlike k": (dict(v=(2, 9, 2, 16)), {}, "v has shape"),
    "heads do not divide": (dict(k=(2, 8, 3, 16), v=(2, 8, 3, 16)), {}, "K must divide H"),
    "integers": (dict(dtype=jnp.int32), {}, "need float32, bfloat16 or float16"),
    "kv segments alone": ({}, dict(kv_segment_ids=jnp.zeros((2, 8), int)), "kv_segment_ids needs segment_ids"),
    "segments of queries alone": (
        dict(k=(2, 9, 2, 16), v=(2, 9, 2, 16)),
        dict(segment_ids=jnp.zeros((2, 8), int)),
        "segment_ids covers T=8 queries, but there are S=9 keys; give kv_segment_ids [B,S] as well",
    ),
    "segments of another shape": ({}, dict(segment_ids=jnp.zeros((2, 9), int)), "segment ids of q has shape (2, 9)"),
    "positions of another length": ({}, dict(q_positions=jnp.arange(7)), "q_positions has shape (7,), need [T=8]"),
    "unknown kernel": ({}, dict(impl="magic"), "impl='magic' is not known; choose one of 'auto', "),
    "window of nothing": (
        {},
        dict(window=0),
        "window=0 must be a whole number of tokens, 1 (itself alone) or more; None sees all",
    ),
    "window of a fraction": ({}, dict(window=2.5), "window=2.5 must be a whole number of tokens"),
    "softcap": ({}, dict(softcap=-1.0), "softcap=-1.0 must be a finite positive number; None leaves it out"),
    "no softcap": ({}, dict(softcap=0.0), "softcap=0.0 must be a finite positive number"),
    "scale": ({}, dict(scale=float("nan")), "scale=nan must be a finite number; None leaves it out"),
    "dropout of all": (
        {},
        dict(dropout_rate=1.0, dropout_key=KEY),
        "dropout_rate=1.0 must be at least 0 and less than 1; 0 leaves dropout out",
    ),
    "dropout of all that 32 bits count": ({}, dict(dropout_rate=1 - 1e-12, dropout_key=KEY), "must be at least 0 and"),
    "dropout of less than nothing": ({}, dict(dropout_rate=-0.1, dropout_key=KEY), "dropout_rate=-0.1 must be at"),
    "dropout without a key": (
        {},
        dict(dropout_rate=0.1),
        "dropout_rate=0.1 needs dropout_key; pass jax.random.key(seed), another one at each step",
    ),
    "a window of three sides": (
        {},
        dict(window=(1, 2, 3)),
        "window=(1, 2, 3) is not two whole numbers of tokens, need",
    ),
    "intervals in one array": (
        {},
        dict(intervals=np.zeros((2, 8, 2), int)),
        "need (start, stop), two arrays of integers",
    ),
    "intervals of other tokens": (
        {},
        dict(intervals=(np.zeros((2, 8), int), np.zeros((2, 9), int))),
        "stop of intervals has shape (2, 9), need [B=2, T=8]",
    ),
    "validity in numbers": (
        {},
        dict(kv_valid=np.ones((2, 8), int)),
        "kv_valid has dtype int64, need bool; give x.astype(bool), True where a key is real",
    ),
    "lengths for each key": ({}, dict(kv_lengths=np.ones((2, 8), int)), "kv_lengths has shape (2, 8), need [B=2]"),
    "a bias for each pair": (
        {},
        dict(kv_bias=np.zeros((2, 4, 8, 8))),
        "kv_bias has shape (2, 4, 8, 8), need [B=2, S=8]",
    ),
    "sinks for key heads": ({}, dict(sinks=np.zeros(2)), "sinks has shape (2,), need [H=4]; reshape or transpose it"),
    "slopes for each head alone": ({}, dict(alibi_slopes=np.zeros((4, 1))), "alibi_slopes has shape (4, 1), need [H=4"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_blockwise_attention_refuses_a_bad_call_in_words(case):
    shapes, arguments, message = BAD_CALLS[case]
    shapes = dict(q=(2, 8, 4, 16), k=(2, 8, 2, 16), v=(2, 8, 2, 16), dtype=jnp.float32) | shapes
    dtype = shapes.pop("dtype")
    arrays = [jnp.zeros(shape, dtype) for shape in shapes.values()]
    with pytest.raises(ValueError, match=re.escape(message)):
        ra.blockwise_attention(*arrays, **arguments)


def test_blockwise_attention_refuses_dtypes_that_differ():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="dtypes float32, bfloat16, float32; cast them"):
        ra.blockwise_attention(q, q.astype(jnp.bfloat16), q)
