import dataclasses
import decimal
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.rope import RopeConfig, apply_rotary, frequencies, rotary_tables, with_query_growth

PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
THETA = RopeConfig(theta=10_000.0)
POSITIONS = [0, 1, 12_345, 10_000_000, 1_234_567_890, 2**31 - 1]


def _exact_tables(positions, head_dim, theta):
    """Cosines and sines by decimal arithmetic with 60 digits."""
    with decimal.localcontext(prec=60):
        angles = []
        for j in range(0, head_dim, 2):
            frequency = decimal.Decimal(theta) ** (decimal.Decimal(-j) / head_dim)
            angles.append([float(p * frequency % (2 * PI)) for p in positions])
    angles = np.array(angles).T
    return np.cos(angles), np.sin(angles)


@pytest.mark.parametrize(("head_dim", "theta"), [(64, 500_000.0), (128, 10_000.0), (6, 2.5)])
def test_angles_are_exact_at_any_position(head_dim, theta):
    want = _exact_tables(POSITIONS, head_dim, theta)
    got = rotary_tables(jnp.array(POSITIONS), head_dim, RopeConfig(theta=theta))
    frequencies = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    naive = np.array(POSITIONS, np.float32)[:, None] * frequencies
    for table, exact, naive_table in zip(got, want, (np.cos(naive), np.sin(naive)), strict=True):
        assert table.dtype == jnp.float32
        assert table.shape == (len(POSITIONS), head_dim // 2)
        assert np.abs(table - exact).max() < 1e-6
        assert np.abs(naive_table[3] - exact[3]).max() > 1e-2  # the control: float32 at position ten million


def test_tables_take_positions_of_any_shape():
    cos, sin = rotary_tables(jnp.arange(6).reshape(2, 3), 8, THETA)
    flat = rotary_tables(jnp.arange(6), 8, THETA)
    np.testing.assert_array_equal(cos.reshape(6, 4), flat[0])
    np.testing.assert_array_equal(sin.reshape(6, 4), flat[1])


def _scores(positions_of_q, positions_of_k, x, y, rope=THETA):
    turn = lambda x, positions: apply_rotary(x, *rotary_tables(positions[None], x.shape[-1], rope))  # noqa: E731
    return jnp.einsum("bthd,bshd->bhts", turn(x, positions_of_q), turn(y, positions_of_k))


def test_scores_depend_on_differences_of_positions_only():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((1, 5, 2, 16)), jnp.float32) for _ in range(2))
    positions = jnp.array([0, 1, 7, 100, 4000])
    near = _scores(positions, positions, x, y)
    for shift in (1, 9_999_999, 2_000_000_000):
        np.testing.assert_allclose(_scores(positions + shift, positions + shift, x, y), near, atol=2e-5)
    assert np.abs(_scores(positions + 1, positions, x, y) - near).max() > 0.1  # the control


def test_pairs_are_turned_by_the_angle_and_keep_their_length():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4, 10)), jnp.float32)
    positions = jnp.array([[3, 1, 4], [1, 5, 9]])
    got = np.asarray(apply_rotary(x, *rotary_tables(positions, 10, RopeConfig(theta=100.0))))
    pair = np.asarray(x[..., 2]) + 1j * np.asarray(x[..., 7])  # the pair (x[j], x[j + D/2]) with j = 2
    turned = pair * np.exp(1j * np.asarray(positions)[..., None] * 100.0 ** (-4 / 10))
    np.testing.assert_allclose(got[..., 2] + 1j * got[..., 7], turned, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


def test_dtype_is_kept_and_work_is_in_float32():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 4, 2, 8)), jnp.bfloat16)
    tables = rotary_tables(jnp.arange(1000, 1004)[None], 8, THETA)
    got = apply_rotary(x, *tables)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, apply_rotary(x.astype(jnp.float32), *tables).astype(jnp.bfloat16))
    rough = apply_rotary(x.astype(jnp.float32), *(t.astype(jnp.bfloat16) for t in tables)).astype(jnp.bfloat16)
    assert math.isfinite(float(rough.sum()))
    assert not np.array_equal(got, rough)  # the control: tables in bfloat16 give other numbers


SCALED = {
    "linear": RopeConfig(theta=10_000.0, scaling="linear", factor=4.0),
    "dynamic": RopeConfig(theta=10_000.0, scaling="dynamic", factor=2.0, original_len=256),
    "yarn": RopeConfig(theta=10_000.0, scaling="yarn", factor=8.0, original_len=256),
    "llama3": RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_len=256),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_stretched_window_keeps_fast_pairs_and_slows_the_slowest_by_the_factor(name):
    rope, head_dim = SCALED[name], 64
    plain = frequencies(RopeConfig(theta=rope.theta), head_dim, 0)
    got = frequencies(rope, head_dim, 256 * 4)
    slower = plain / got
    growth = (2 * 4 - 1) ** (64 / 62)  # of theta, so the last pair slows by that to the power 62/64
    assert slower[-1] == pytest.approx({"dynamic": 2 * 4 - 1}.get(name, rope.factor), rel=1e-12)
    assert slower[0] == pytest.approx(4.0 if name == "linear" else 1.0, rel=1e-12)
    assert (np.diff(slower) > -1e-9).all()
    if name == "dynamic":
        np.testing.assert_allclose(slower, growth ** (np.arange(0, 64, 2) / 64), rtol=1e-12)
        np.testing.assert_array_equal(frequencies(rope, head_dim, 200), plain)  # within the window: as it was trained
    between = (slower > 1.01) & (slower < 0.99 * slower[-1])
    assert between.any() == (name != "linear")


def test_yarn_divides_by_how_often_a_pair_turns_in_the_original_window():
    rope, head_dim = SCALED["yarn"], 64
    plain = frequencies(RopeConfig(theta=rope.theta), head_dim, 0)
    turns = rope.original_len * plain / (2 * math.pi)
    share = (1 - frequencies(rope, head_dim, 0) / plain) / (1 - 1 / rope.factor)
    assert (share[turns > rope.beta_fast] < 1e-12).all()
    assert (share[turns < rope.beta_slow / rope.theta ** (2 / head_dim)] > 1 - 1e-12).all()
    ramp = share[(share > 1e-9) & (share < 1 - 1e-9)]
    assert len(ramp) > 3
    np.testing.assert_allclose(np.diff(ramp), np.diff(ramp)[0], rtol=1e-6)


def test_yarn_makes_queries_and_keys_longer_and_the_others_do_not():
    positions = jnp.arange(300)
    for name, rope in SCALED.items():
        cos, sin = rotary_tables(positions, 64, rope, length=300)
        want = 0.1 * math.log(8.0) + 1 if name == "yarn" else 1.0
        np.testing.assert_allclose(jnp.hypot(cos, sin), want, rtol=1e-6)
    told = dataclasses.replace(SCALED["yarn"], attention_factor=1.5)
    np.testing.assert_allclose(jnp.hypot(*rotary_tables(positions, 64, told)), 1.5, rtol=1e-6)


LONGROPE = RopeConfig(
    theta=10_000.0,
    fraction=0.75,
    scaling="longrope",
    factor=8.0,
    original_len=32,
    short_factors=(1.0, 1.05, 1.1, 1.2, 1.4, 1.5),
    long_factors=(1.0, 1.3, 2.0, 4.0, 8.0, 16.0),
)


def test_longrope_divides_by_short_factors_up_to_the_original_length_and_by_long_ones_beyond_it():
    plain = frequencies(RopeConfig(theta=10_000.0, fraction=0.75), 16, 0)
    for length, factors in ((0, "short"), (32, "short"), (33, "long"), (4096, "long")):
        got = plain / frequencies(LONGROPE, 16, length)
        np.testing.assert_allclose(got, getattr(LONGROPE, f"{factors}_factors"), rtol=1e-12)
    assert LONGROPE.magnitude == pytest.approx(math.sqrt(1 + math.log(8) / math.log(32)))
    assert dataclasses.replace(LONGROPE, attention_factor=1.1).magnitude == 1.1
    x = jnp.ones((1, 1, 1, 16))
    turned = apply_rotary(x, *rotary_tables(jnp.zeros((1, 1), jnp.int32), 16, LONGROPE, length=32))
    np.testing.assert_allclose(turned[0, 0, 0], [LONGROPE.magnitude] * 12 + [1.0] * 4, rtol=1e-6)


def test_lengths_of_the_same_frequencies_share_a_program_and_others_do_not():
    dynamic = SCALED["dynamic"]
    assert [dynamic.scaled_length(n) for n in (1, 256, 257, 900)] == [0, 0, 257, 900]
    assert [LONGROPE.scaled_length(n) for n in (1, 32, 33, 900)] == [0, 0, 33, 33]
    assert {SCALED[name].scaled_length(900) for name in ("linear", "yarn", "llama3")} == {0}
    sizes = dict(vocab_size=8, num_layers=2, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=16, ffn_dim=8)
    model = ModelConfig(**sizes, layers=(LayerKind(rope=dynamic), LayerKind(rope=LONGROPE)))
    assert [model.scaled_length(n) for n in (1, 32, 33, 256, 257, 900)] == [0, 0, 33, 33, 257, 900]
    for tokens in (1, 32, 33, 100, 256, 257, 900):
        for rope in model.ropes:
            same = frequencies(rope, 16, model.scaled_length(tokens))
            np.testing.assert_array_equal(same, frequencies(rope, 16, tokens))
    with pytest.raises(ConfigError, match="short_factors: length=6: must be 8 numbers"):
        ModelConfig(**sizes, rope=dataclasses.replace(LONGROPE, fraction=1.0))


def test_a_ramp_that_is_not_rounded_begins_and_ends_between_pairs():
    rounded = SCALED["yarn"]
    exact = dataclasses.replace(rounded, truncate=False)
    plain = frequencies(RopeConfig(theta=1e4), 64, 0)
    share = (1 - frequencies(exact, 64, 0) / plain) / (1 - 1 / 8)
    pair = lambda times: 64 * math.log(256 / (times * 2 * math.pi)) / (2 * math.log(1e4))  # noqa: E731
    first, last = pair(32.0), pair(1.0)
    np.testing.assert_allclose(share, np.clip((np.arange(32) - first) / (last - first), 0, 1), atol=1e-12)
    assert np.abs(frequencies(exact, 64, 0) - frequencies(rounded, 64, 0)).max() > 1e-3  # the control


def test_queries_grow_by_each_original_window_before_them_and_keys_do_not():
    rope = dataclasses.replace(SCALED["yarn"], query_growth=0.1)
    positions = jnp.array([0, 255, 256, 511, 512, 256 * 40])
    tables = rotary_tables(positions, 64, rope)
    rotary = with_query_growth(tables, positions, rope)
    grown = np.hypot(*rotary.query)[:, 0] / rope.magnitude
    np.testing.assert_allclose(grown, 1 + 0.1 * np.log1p([0, 0, 1, 1, 2, 40]), rtol=1e-6)
    assert rotary.key is tables


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(theta=1.0), "model.rope.theta=1.0: must be more than 1"),
        (dict(scaling="ntk"), "is not known; choose one of none, linear"),
        (dict(factor=2.0), "model.rope.factor=2.0: is not used by model.rope.scaling='none'"),
        (dict(scaling="linear", factor=0.5), "must be at least 1"),
        (dict(scaling="linear", factor=2.0, original_len=4096), "original_len=4096: is not used .* takes factor"),
        (dict(scaling="yarn", factor=2.0), "original_len=0: must be positive with model.rope.scaling='yarn'"),
        (dict(scaling="yarn", factor=2.0, original_len=64, beta_slow=40.0), "must lie between 0 and .*beta_fast=32"),
        (dict(scaling="llama3", factor=2.0, original_len=64, low_freq_factor=4.0), "between 0 and .*high_freq_factor"),
        (dict(scaling="yarn", factor=2.0, original_len=64, attention_factor=-1.0), "must not be negative; 0 takes"),
        (
            dict(scaling="yarn", factor=2.0, original_len=64, query_growth=-1.0),
            "query_growth=-1.0: must not be negative",
        ),
        (
            dict(scaling="yarn", factor=2.0, original_len=64, query_growth=0.1, fraction=0.5),
            "whole heads must be turned",
        ),
        (dict(scaling="longrope", original_len=64, long_factors=(1.0, 0.0)), "long_factors=.*: must be positive, all"),
        (dict(scaling="longrope", factor=2.0, original_len=1), "original_len=1: must be at least 2"),
        (dict(scaling="linear", factor=2.0, truncate=False), "truncate=False: is not used by"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        RopeConfig(**fields)
