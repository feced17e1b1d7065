import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import quickly

import ring_attention as ra
from ring_attention.attention import dropout
from ring_attention.attention.dropout import seeds_of
from ring_attention.attention.reference import reference_gradients
from ring_attention.testing import NAMES, dense_attention, oracle, random_qkv, relative_error

B, T, S, H, K, D, D_V = 2, 5, 7, 4, 2, 3, 4
KEY = jax.random.key(5)
kept = quickly(dropout.kept, static_argnums=0)
SINKS = np.array([0.7, -1.2, 0.1, 2.0])
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])  # exact in float32
LATE = np.array([[2, 3, 4, 5, 6], [6, 0, 4, 9, 2]])
"""Positions of queries for keys at 0..6: the second sequence's are in no order, and go beyond the keys."""

SEGMENTS = {
    "segment_ids": np.array([[1, 1, 2, 2, 9], [3, 1, 1, 2, 2]]),
    "kv_segment_ids": np.array([[1] * 3 + [2] * 4] * 2),
}
"""The last query of the first sequence and the first of the second see nothing."""

CASES = {
    "causal": {},
    "all keys": dict(causal=False),
    "window": dict(window=3, q_positions=LATE),
    "window both ways": dict(window=2, causal=False),
    "packed": dict(causal=False, **SEGMENTS),
    "positions": dict(q_positions=LATE, kv_positions=np.array([0, 5, 3, 3, 1, 8, 2])),
    "softcap": dict(softcap=1.5),
    "scale": dict(scale=1.3),
    "sinks": dict(sinks=SINKS),
    "sinks where some see nothing": dict(sinks=SINKS, causal=False, **SEGMENTS),
    "alibi": dict(alibi_slopes=SLOPES, causal=False),
    "dropout": dict(dropout_rate=0.4, dropout_key=KEY, causal=False),
    "dropout at positions": dict(
        dropout_rate=0.4,
        dropout_key=KEY,
        causal=False,
        q_positions=LATE + 2**31 - 20,
        kv_positions=np.arange(S) + 2**31 - 20,
    ),
    "all at once": dict(
        window=4,
        q_positions=LATE,
        softcap=0.8,
        scale=0.9,
        sinks=SINKS,
        alibi_slopes=SLOPES,
        dropout_rate=0.3,
        dropout_key=KEY,
        **SEGMENTS,
    ),
    "all at once, both ways": dict(
        causal=False, window=3, softcap=2.0, sinks=SINKS, alibi_slopes=SLOPES, dropout_rate=0.2, dropout_key=KEY
    ),
}


def _inputs():
    """q, k, v and a cotangent, float64."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, H, D), (B, S, K, D), (B, S, K, D_V), (B, T, H, D_V)]
    return [rng.standard_normal(shape) for shape in shapes]


def _mix_int(x):
    """`dropout.mix` of one word, in Python's unbounded integers (or of many, in an array of uint64)."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) % 2**32
    x = x ^ (x >> 15)
    x = (x * 0xD35A2D97) % 2**32
    return x ^ (x >> 15)


def _bits(key, batch, head, query, at):
    """The random bits of one weight, in Python's unbounded integers."""
    a, b = (int(seed) for seed in seeds_of(key))
    for word in (batch, head, query):
        a, b = _mix_int((a + word) % 2**32), _mix_int((b + word) % 2**32)
    return _mix_int(_mix_int((a + at) % 2**32) ^ b)


def _score_by_hand(q_D, k_D, distance, h, a):
    """The score of one query and one key."""
    score = a.get("scale", D**-0.5) * sum(float(x) * float(y) for x, y in zip(q_D, k_D, strict=True))
    if "softcap" in a:
        score = a["softcap"] * math.tanh(score / a["softcap"])
    return score - a["alibi_slopes"][h] * distance if "alibi_slopes" in a else score


def _row_by_hand(q, k, v, b, t, h, a):
    """(out [D_V], lse) of one query, one key at a time."""
    q_at = np.broadcast_to(a.get("q_positions", np.arange(T)), (B, T))[b]
    k_at = np.broadcast_to(a.get("kv_positions", np.arange(S)), (B, S))[b]
    out, total, query = [0.0] * D_V, 0.0, int(q_at[t])
    for s in range(S):
        key = int(k_at[s])
        if a.get("causal", True) and key > query:
            continue
        if "window" in a and abs(query - key) >= a["window"]:
            continue
        if "segment_ids" in a and a["segment_ids"][b, t] != a["kv_segment_ids"][b, s]:
            continue
        weight = math.exp(_score_by_hand(q[b, t, h], k[b, s, h // (H // K)], abs(query - key), h, a))
        total += weight
        rate = a.get("dropout_rate", 0.0)
        if rate == 0 or _bits(a["dropout_key"], b, h, query, key) >= round(rate * 2**32):
            out = [x + weight * float(y) / (1 - rate) for x, y in zip(out, v[b, s, h // (H // K)], strict=True)]
    total += math.exp(a["sinks"][h]) if "sinks" in a else 0.0
    return ([x / total for x in out], math.log(total)) if total else (out, -math.inf)


@pytest.mark.parametrize("case", CASES)
def test_reference_attention_matches_a_loop_over_numbers(case):
    q, k, v, _ = _inputs()
    out, lse = ra.reference_attention(q, k, v, **CASES[case], return_lse=True)
    assert out.dtype == lse.dtype == np.float64
    for b, t, h in np.ndindex(B, T, H):
        want_out, want_lse = _row_by_hand(q, k, v, b, t, h, CASES[case])
        np.testing.assert_allclose(out[b, t, h], want_out, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(lse[b, t, h], want_lse, rtol=1e-12, atol=1e-14)


def _difference(loss, x, direction, step=1e-6):
    """The central difference of loss() along a direction of x, which is changed in place and put back."""
    here, values = x.copy(), []
    for moved in (here + step * direction, here - step * direction):
        x[...] = moved
        values.append(loss())
    x[...] = here
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("case", CASES)
def test_reference_gradients_are_slopes_of_the_output_and_lse(case):
    q, k, v, dout = _inputs()
    arguments = dict(CASES[case])
    moving = [q, k, v]
    if "sinks" in arguments:
        arguments["sinks"] = arguments["sinks"].copy()
        moving.append(arguments["sinks"])
    rng = np.random.default_rng(1)
    dlse = rng.standard_normal((B, T, H))
    gradients = reference_gradients(q, k, v, dout, dlse=dlse, **arguments)

    def loss():
        out, lse = ra.reference_attention(q, k, v, return_lse=True, **arguments)
        return (dout * out).sum() + (dlse * np.where(np.isfinite(lse), lse, 0)).sum()

    for got, x in zip(gradients, moving, strict=True):
        for direction in rng.standard_normal((8, *x.shape)):  # a number that is wrong shows in each of them
            np.testing.assert_allclose((got * direction).sum(), _difference(loss, x, direction), atol=1e-8)
        assert np.abs(got).max() > 1e-2  # the control: gradients of zero would not pass


@pytest.mark.parametrize("case", [case for case in CASES if case != "causal"])
def test_reference_arguments_matter_by_far_more_than_tolerances(case):
    q, k, v, dout = _inputs()
    mask = CASES[case]
    for name in mask.keys() - {"dropout_key", "kv_segment_ids"}:
        without = {key: value for key, value in mask.items() if key not in (name, "kv_" + name)}
        for got, other in zip(oracle(q, k, v, dout, **mask), oracle(q, k, v, dout, **without), strict=True):
            assert relative_error(got, other) > 1e-3, name


def _dense_everything(q, k, v, dout, sinks, mask):
    """(out, dq, dk, dv) of `dense_attention` and, where there are sinks, dsinks."""
    mask = {name: value for name, value in mask.items() if name != "sinks"}
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v, *([] if sinks is None else [sinks]))]

    @quickly
    def run(arrays, dout):
        out, vjp = jax.vjp(lambda q, k, v, sinks=None: dense_attention(q, k, v, sinks=sinks, **mask), *arrays)
        return out, *vjp(dout)

    with jax.debug_nans(True):
        return run(arrays, jnp.asarray(dout, jnp.float32))


@pytest.mark.parametrize("case", CASES)
def test_dense_attention_in_float32_is_close_to_the_oracle(case):
    q, k, v, dout = (np.float32(x) for x in _inputs())
    mask = CASES[case]
    got = _dense_everything(q, k, v, dout, mask.get("sinks"), mask)
    want = [ra.reference_attention(q, k, v, **mask), *reference_gradients(q, k, v, dout, **mask)]
    for name, g, w in zip((*NAMES, "dsinks"), got, want, strict=False):
        assert relative_error(g, w) < 1e-5, name
    assert len(got) == len(want) == (5 if "sinks" in mask else 4)


@pytest.mark.parametrize("causal", [True, False])
def test_reference_window_of_w_shows_w_keys(causal):
    tokens, window = 24, 6
    q = k = np.zeros((1, tokens, 1, tokens))
    v = np.eye(tokens)[None, :, None, :]  # the output is then the row of weights
    seen = lambda window: ra.reference_attention(q, k, v, causal=causal, window=window)[0, :, 0] > 0  # noqa: E731
    for t in range(window, tokens - window):
        want = range(t - window + 1, t + 1 if causal else t + window)
        assert list(np.flatnonzero(seen(window)[t])) == list(want)
    np.testing.assert_array_equal(seen(1), np.eye(tokens, dtype=bool))
    np.testing.assert_array_equal(seen(tokens), np.tri(tokens, dtype=bool) if causal else True)
    q, k, v, _ = random_qkv(1, 1, tokens, 2, 1, 8)
    attend = functools.partial(ra.reference_attention, q, k, v, causal=causal)
    assert relative_error(attend(window=window), attend(window=window + 1)) > 1e-2
    assert relative_error(dense_attention(q, k, v, causal=causal, window=window), attend(window=window)) < 1e-6


@pytest.mark.parametrize("sinks", [None, SINKS])
def test_reference_is_zero_where_a_query_sees_nothing(sinks):
    q, k, v, dout = _inputs()
    mask = dict(causal=False, sinks=sinks, segment_ids=np.full((B, T), 1), kv_segment_ids=np.full((B, S), 2))
    out, lse = ra.reference_attention(q, k, v, **mask, return_lse=True)
    assert np.all(out == 0)
    np.testing.assert_array_equal(lse, np.broadcast_to(-np.inf if sinks is None else sinks, (B, T, H)))
    assert all(np.all(gradient == 0) for gradient in reference_gradients(q, k, v, dout, **mask))
    assert all(np.all(np.asarray(x) == 0) for x in _dense_everything(q, k, v, dout, sinks, mask))


def test_reference_sink_takes_its_share_of_the_softmax():
    q, k, v, dout = _inputs()
    without, without_lse = ra.reference_attention(q, k, v, return_lse=True)
    out, lse = ra.reference_attention(q, k, v, sinks=SINKS, return_lse=True)
    np.testing.assert_allclose(lse, np.logaddexp(without_lse, SINKS), rtol=1e-12)
    np.testing.assert_allclose(out, without * np.exp(without_lse - lse)[..., None], rtol=1e-12)
    none = ra.reference_attention(q, k, v, sinks=np.full(H, -np.inf))
    np.testing.assert_array_equal(none, without)
    assert relative_error(out, without) > 0.1
    assert len(oracle(q, k, v, dout, sinks=SINKS)) == len(NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window=0), "window=0 must be"),
        (dict(softcap=-1.0), "softcap=-1.0 must be"),
        (dict(dropout_rate=0.1), "needs dropout_key"),
        (dict(sinks=np.zeros(K)), "sinks has shape"),
        (dict(alibi_slopes=np.zeros(K)), "alibi_slopes has shape"),
    ],
)
def test_reference_attention_refuses_a_bad_argument_in_words(arguments, message):
    q, k, v, dout = _inputs()
    with pytest.raises(ValueError, match=message):
        ra.reference_attention(q, k, v, **arguments)
    with pytest.raises(ValueError, match=message):
        reference_gradients(q, k, v, dout, **arguments)


def _kept_by_oracle(rate, key, q_positions, kv_positions, heads=3):
    """Bool [B,H,T,S]: what the oracle keeps, read off weights that are all the same."""
    batch, keys = np.shape(kv_positions)
    q = np.zeros((batch, np.shape(q_positions)[1], heads, keys))
    k = np.zeros((batch, keys, 1, keys))
    v = np.broadcast_to(np.eye(keys)[None, :, None, :], k.shape)
    at = dict(q_positions=q_positions, kv_positions=kv_positions)
    p = ra.reference_attention(q, k, v, causal=False, dropout_rate=rate, dropout_key=key, **at)
    assert set(np.round(np.unique(p) * keys * (1 - rate), 12)) == {0.0, 1.0}
    return np.swapaxes(p > 0, 1, 2)


def _kept(rate, key, batch=1, heads=1, queries=1, keys=1):
    """Bool [batch,heads,queries,keys] of `dropout.kept`."""
    indices = np.ix_(*(np.arange(n) for n in (batch, heads, queries, keys)))
    return np.asarray(kept(rate, seeds_of(key), *(jnp.asarray(index, jnp.int32) for index in indices)))


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(4)], ids=["new style", "old style"])
def test_reference_drops_the_weights_that_jax_drops(rate, key):
    rng = np.random.default_rng(8)
    q_at, k_at = rng.integers(0, 2**31, (2, 32)), rng.integers(0, 2**31, (2, 40))
    indices = (
        np.arange(2)[:, None, None, None],
        np.arange(3)[:, None, None],
        q_at[:, None, :, None],
        k_at[:, None, None],
    )
    want = np.asarray(kept(rate, seeds_of(key), *(jnp.asarray(index, jnp.int32) for index in indices)))
    np.testing.assert_array_equal(_kept_by_oracle(rate, key, q_at, k_at), want)
    assert not want.all()
    assert (_kept_by_oracle(rate, jax.random.key(9), q_at, k_at) != want).any()


def test_dropout_threshold_is_where_the_specification_has_it():
    bits = _bits(KEY, 0, 2, 11, 13)
    for rate, want in [(bits / 2**32, True), ((bits + 1) / 2**32, False)]:
        got = kept(rate, seeds_of(KEY), *(jnp.int32(index) for index in (0, 2, 11, 13)))
        assert bool(got) == want
        p = ra.reference_attention(
            np.zeros((1, 1, 3, 2)),
            np.zeros((1, 1, 1, 2)),
            np.ones((1, 1, 1, 2)),
            causal=False,
            q_positions=[11],
            kv_positions=[13],
            dropout_rate=rate,
            dropout_key=KEY,
        )
        assert (p[0, 0, 2] > 0).all() == want


SIGMAS = 5.5
"""How far a statistic of independent draws may stray: once in 25 million."""


def _correlation(x, y):
    return np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_dropout_keeps_a_fraction_of_one_less_the_rate(rate):
    keep = _kept(rate, KEY, batch=2, heads=4, queries=256, keys=512)
    for axes in [
        (0, 1, 2, 3),
        (1, 2, 3),
        (0, 2, 3),
        (0, 1, 3),
        (0, 1, 2),
    ]:  # of all, a sequence, a head, a row, a column
        fraction = keep.mean(axes)
        samples = keep.size // fraction.size
        assert np.all(np.abs(fraction - (1 - rate)) < SIGMAS * math.sqrt(rate * (1 - rate) / samples))
    off = rate + 2 * SIGMAS * math.sqrt(rate * (1 - rate) / keep.size)  # the control: the bound notices this rate
    assert abs(keep.mean() - (1 - off)) > SIGMAS * math.sqrt(rate * (1 - rate) / keep.size)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_independent_along_every_axis(rate):
    draw = lambda seed: _kept(rate, jax.random.key(seed), batch=2, heads=4, queries=128, keys=128)  # noqa: E731
    keep = draw(0)
    pairs = {f"seed {seed}": (keep, draw(seed)) for seed in range(1, 5)}
    pairs["sequences"] = keep[0], keep[1]
    pairs |= {f"heads {g} and {h}": (keep[:, g], keep[:, h]) for g in range(4) for h in range(g)}
    for step in (1, 2, 3, 4, 8, 16, 32, 64):
        pairs[f"rows {step} apart"] = keep[:, :, step:], keep[:, :, :-step]
        pairs[f"columns {step} apart"] = keep[..., step:], keep[..., :-step]
        pairs[f"diagonals {step} apart"] = keep[..., step:, step:], keep[..., :-step, :-step]
    pairs["transposed"] = (
        keep[..., *np.tril_indices(128, -1)],
        np.swapaxes(keep, -1, -2)[..., *np.tril_indices(128, -1)],
    )
    for name, (x, y) in pairs.items():
        assert abs(_correlation(x, y)) < SIGMAS / math.sqrt(x.size), name
    assert _correlation(keep, draw(0)) > 0.999  # the controls: the same draw, and one with a tenth in common
    mixed = np.where(np.random.default_rng(0).random(keep.shape) < 0.1, keep, draw(1))
    assert _correlation(keep, mixed) > SIGMAS / math.sqrt(keep.size)


def _largest_shifted_correlation(rows, lags=8):
    """The largest correlation of a row with the next one shifted by up to `lags`."""
    inner = slice(lags, rows.shape[1] - lags)
    shifted = [np.roll(rows[1:], lag, axis=1)[:, inner] for lag in range(-lags, lags + 1)]
    return max(abs(_correlation(x, y)) for other in shifted for x, y in zip(rows[:-1, inner], other, strict=True))


@pytest.mark.parametrize("along", ["queries", "heads", "batch"])
def test_dropout_rows_are_no_shifted_copies_of_neighbours(along):
    rows = np.squeeze(_kept(0.5, KEY, **{along: 32}, keys=2048))
    bound = SIGMAS / math.sqrt(2048 - 16)
    assert _largest_shifted_correlation(rows) < bound
    copies = np.stack([np.roll(rows[0], 3 * n) for n in range(4)])  # the control: what query + key alone would give
    assert _largest_shifted_correlation(copies) > bound


def test_dropout_rows_equal_in_one_lane_are_no_shifted_copies():
    heads, queries = (index.ravel() for index in np.mgrid[:32, :2048])
    state = _mix_int(int(seeds_of(KEY)[0]))  # of the first lane, for sequence 0
    states = _mix_int((_mix_int((state + heads.astype(np.uint64)) % 2**32) + queries.astype(np.uint64)) % 2**32)
    order = np.argsort(states)
    gaps = np.diff(states[order]).astype(int)
    meet = np.flatnonzero(gaps < 64)
    assert len(meet) > 32  # of 65536 rows that start anywhere in 2**32
    ahead, behind, keys = order[meet], order[meet + 1], np.arange(2048)
    keep = lambda rows: np.asarray(  # noqa: E731
        kept(0.5, seeds_of(KEY), jnp.int32(0), heads[rows][:, None], queries[rows][:, None], keys)
    )
    one_lane = lambda rows: _mix_int((states[rows][:, None] + keys.astype(np.uint64)) % 2**32) % 2  # noqa: E731
    for draw, copied in [(keep, False), (one_lane, True)]:  # the control: a hash of one lane
        for x, y, gap in zip(draw(ahead), draw(behind), gaps[meet], strict=True):
            assert (abs(_correlation(x[gap:], y[: len(y) - gap])) > SIGMAS / math.sqrt(len(y) - gap)) == copied
