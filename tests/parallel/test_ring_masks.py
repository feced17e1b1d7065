"""Everything that changes a weight, through rings: each argument in each layout, on any mesh, at any length."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from ring_helpers import Bound, assert_exact, costly, quickly, results, ring_mesh, sharded

import ring_attention as ra
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.testing import NAMES, errors, random_qkv, random_segments

B, T, H, K, D = 3, 47, 4, 2, 8  # no ring of more than one device divides this length
KEY = jax.random.key(3)

ARGUMENTS = dict(
    softcap=dict(softcap=1.5),
    sinks=dict(sinks=np.array([0.7, -1.2, 0.1, 2.0]), kv_valid=np.arange(B * T).reshape(B, T) % 7 > 0),
    alibi=dict(
        alibi_slopes=np.array([0.5, 0.25, 0.125, 0.0625]),
        kv_bias=np.random.default_rng(2).normal(0, 2, (B, T)).astype(np.float32),
    ),
    dropout=dict(dropout_rate=0.3, dropout_key=KEY),
    packed=dict(
        segment_ids=random_segments(1, B, T, count=3),
        intervals=ra.Intervals.chunks(np.arange(T)[None].repeat(B, 0), 12),
    ),
)
WINDOWS = dict(none=None, short=5, long=(22, 13))  # shorter than a shard; longer than one of three
DTYPES = dict(f32="float32", bf16="bfloat16", f16="float16")

CHOICES = [LAYOUT_KINDS, (2, 3), tuple(DTYPES), (True, False), tuple(WINDOWS), *[(False, True)] * len(ARGUMENTS)]
# layout, P, dtype, causal, window; softcap, sinks, alibi, dropout, packed
CASES = [
    ("contiguous", 2, "bf16", True, "short", True, True, False, False, True),
    ("contiguous", 2, "f32", False, "none", True, True, True, False, False),
    ("contiguous", 3, "f16", False, "long", False, False, True, True, False),
    ("contiguous", 3, "f16", False, "short", False, False, False, True, True),
    ("zigzag", 2, "f32", True, "long", False, True, False, True, True),
    ("zigzag", 3, "f16", True, "short", True, True, True, False, False),
    ("zigzag", 3, "bf16", False, "none", False, False, True, True, True),
    ("striped", 2, "f16", True, "none", False, False, False, False, False),
    ("striped", 3, "f32", False, "short", True, False, True, True, True),
    ("striped", 3, "bf16", False, "long", True, True, False, False, False),
]


def test_cases_cover_every_pair_of_choices():
    for i, j in itertools.combinations(range(len(CHOICES)), 2):
        assert {(case[i], case[j]) for case in CASES} == set(itertools.product(CHOICES[i], CHOICES[j]))


def _id(case):
    on = [name for name, chosen in zip(ARGUMENTS, case[5:], strict=True) if chosen]
    return "-".join(map(str, (*case[:5], *on)))


@pytest.mark.parametrize(
    ("case", "impl"),
    [pytest.param(case, "plain", id=_id(case)) for case in CASES[1::2]]
    + [pytest.param(case, "xla", marks=pytest.mark.slow, id=_id(case)) for case in CASES[::2]],
)
def test_ring_attention_is_exact_with_arguments_together(case, impl):
    layout, P, dtype, causal, window, *chosen = case
    arguments = dict(causal=causal, window=WINDOWS[window])
    for own, has in zip(ARGUMENTS.values(), chosen, strict=True):
        arguments |= own if has else {}
    qkv = random_qkv(P, B, T, H, K, D, dtype=DTYPES[dtype])
    assert_exact(results(sharded(ring_mesh(P), layout, impl=impl), qkv, **arguments), qkv, **arguments)


# --- Dropout counts by global indices ---------------------------------------------------------------------------------


DROPOUT = dict(dropout_rate=0.5, dropout_key=KEY)


@pytest.fixture(scope="module")
def dropout():
    qkv = random_qkv(4, 4, 48, 8, 4, D)
    return qkv, Bound(qkv, **DROPOUT)


# A ring of one device deals no tokens: each layout is the same there.
RINGS = [
    *itertools.product(LAYOUT_KINDS, [dict(sp=8), dict(dp=2, sp=2, tp=2)]),
    ("zigzag", dict(sp=1)),
    ("striped", dict(dp=2, fsdp=2, tp=2)),
]


@pytest.mark.parametrize(("layout", "shape"), RINGS, ids=str)
def test_ring_attention_drops_the_same_on_any_ring(layout, shape, dropout):
    qkv, bound = dropout
    mesh = ra.make_mesh(**shape, devices=jax.devices()[: np.prod(list(shape.values()))])
    assert bound.too_large(results(sharded(mesh, layout, impl="plain"), qkv, **DROPOUT)) == {}


def test_ring_attention_drops_others_with_another_key(dropout):
    (q, k, v, _), bound = dropout
    attend = sharded(ring_mesh(2), dropout_rate=0.5, impl="plain")
    run = quickly(lambda key: attend(q, k, v, dropout_key=key))
    assert bound.too_large([run(KEY)]) == {}
    assert bound.too_large([run(jax.random.key(4))])


# --- Any length -------------------------------------------------------------------------------------------------------


# Of two tokens some devices get nothing but padding. Each pair of a layout, a direction and a length is there.
LENGTHS = [
    (layout, causal, 37 if causal == (layout == "striped") else 2)
    for layout in LAYOUT_KINDS
    for causal in (True, False)
]


@pytest.mark.parametrize(("layout", "causal", "length"), LENGTHS)
def test_ring_attention_takes_any_length(layout, causal, length):
    qkv = random_qkv(length, 2, length, 4, 2, 8)
    mask = dict(causal=causal, segment_ids=random_segments(length, 2, length, count=2) - 1)  # one is 0, as padding is
    ring = sharded(ring_mesh(3), layout, impl="plain")
    assert_exact(results(ring, qkv, **mask), qkv, floor=5e-7, **mask)


# --- Bounded segments -------------------------------------------------------------------------------------------------

SHORT = np.repeat(np.arange(9), [7, 5, 1, 7, 6, 7, 7, 4, 4])[None].repeat(2, axis=0).astype(np.int32)  # 48 tokens


@pytest.mark.parametrize("layout", LAYOUT_KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_max_segment_len_that_holds_changes_nothing(layout, causal):
    qkv, mask = random_qkv(5, 2, 48, 4, 2, 8), dict(segment_ids=SHORT, causal=causal)
    ring = sharded(ring_mesh(4), layout, impl="plain", max_segment_len=7)
    assert_exact(results(ring, qkv, **mask), qkv, **mask)


@pytest.mark.parametrize(("window", "both"), [(None, 5), (9, 5), (3, 3)])
def test_max_segment_len_acts_like_a_window_in_longer_segments(window, both):
    qkv, mask = random_qkv(7, 2, 48, 4, 2, 8), dict(segment_ids=SHORT)
    got = results(sharded(ring_mesh(4), impl="plain", max_segment_len=5), qkv, window=window, **mask)
    assert_exact(got, qkv, window=both, **mask)
    if both != window:  # the control
        assert set(Bound(qkv, window=window, **mask).too_large(got)) == set(NAMES)


# --- Both ways round, and written out ---------------------------------------------------------------------------------

WAYS = [dict(), dict(duplex=True), dict(unroll=True), dict(duplex=True, unroll=True)]


@pytest.mark.parametrize(
    ("layout", "window"),
    [
        ("zigzag", None),
        pytest.param("striped", None, marks=pytest.mark.slow),
        pytest.param("contiguous", 21, marks=pytest.mark.slow),
    ],
)
def test_ring_attention_gives_the_same_duplex_or_unrolled(layout, window):
    qkv, arguments = random_qkv(8, 2, 48, 4, 2, 8), dict(window=window, segment_ids=random_segments(8, 2, 48))
    bound = Bound(qkv, **arguments)
    plain, *others = (results(sharded(ring_mesh(4), layout, impl="plain", **way), qkv, **arguments) for way in WAYS)
    assert bound.too_large(plain) == {}
    for way, got in zip(WAYS[1:], others, strict=True):
        assert bound.too_large(got) == {}, way
        assert max(errors(got, plain)) < 1e-6, way


# --- Anything goes ----------------------------------------------------------------------------------------------------

ANYTHING = given(
    layout=st.sampled_from(LAYOUT_KINDS),
    P=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2)]),
    head_dim=st.sampled_from([1, 3, 8]),
    length=st.integers(1, 50),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 50) | st.tuples(*2 * [st.none() | st.integers(0, 50)]),
    softcap=st.none() | st.sampled_from([0.5, 3.0]),
    rate=st.sampled_from([0.0, 0.4]),
    has=st.fixed_dictionaries(
        dict.fromkeys(
            ("sinks", "alibi_slopes", "segment_ids", "intervals", "kv_valid", "kv_lengths", "kv_bias"), st.booleans()
        )
    ),
    ways=st.fixed_dictionaries(dict(duplex=st.booleans(), unroll=st.booleans())),
    tile=st.sampled_from([4, 9, 256]),
    seed=st.integers(0, 999),
)


def _check(impl, layout, P, heads, head_dim, length, causal, window, softcap, rate, has, ways, tile, seed):
    (H, K), rng = heads, np.random.default_rng(seed)
    drawn = dict(
        sinks=rng.standard_normal(H),
        alibi_slopes=rng.uniform(0, 0.5, H),
        segment_ids=rng.integers(0, 3, (2, length)) if seed % 2 else random_segments(seed, 2, length),
        intervals=(start := rng.integers(0, length, (2, length)), start + rng.integers(0, 12, (2, length))),
        kv_valid=rng.random((2, length)) < 0.8,
        kv_lengths=rng.integers(0, length + 1, 2),
        kv_bias=rng.normal(0, 2, (2, length)).astype(np.float32),
    )
    arguments = dict(causal=causal, window=window, softcap=softcap, dropout_rate=rate, dropout_key=KEY)
    arguments |= {name: drawn[name] for name in has if has[name]}
    qkv = random_qkv(seed, 2, length, H, K, head_dim)
    ring = sharded(ring_mesh(P), layout, impl=impl, block_sizes=ra.BlockSizes(q=tile, kv=tile), **ways)
    assert_exact(results(ring, qkv, **arguments), qkv, floor=5e-7, **arguments)


@pytest.mark.slow
@costly(max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@ANYTHING
def test_ring_attention_matches_oracle_in_any_ring(**drawn):
    _check("plain", **drawn)


@pytest.mark.slow
@pytest.mark.nightly
@costly(max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@ANYTHING
def test_ring_attention_matches_oracle_in_any_ring_with_tiles(**drawn):
    _check("xla", **drawn)
