"""Rings are exact: over layouts, sizes and meshes, and in who sees whom."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from ring_helpers import assert_exact, dense_results, expected, quickly, results, ring_mesh, sharded, simulate

import ring_attention as ra
from ring_attention.parallel import ring_pass
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.testing import errors, random_qkv, random_segments

# Every size is another, so that swapped axes cannot pass.
B, T, H, D = 3, 96, 4, 8

CHOICES = dict(
    layout=LAYOUT_KINDS,
    P=(1, 2, 3, 8),
    K=(4, 2, 1),
    packed=(False, True),
    causal=(True, False),
    dtype=("f32", "bf16"),
    impl=("plain", "xla"),
)
CASES = [
    ("contiguous", 1, 2, True, True, "bf16", "xla"),
    ("striped", 1, 1, True, False, "f32", "plain"),
    ("zigzag", 1, 4, False, True, "bf16", "plain"),
    ("contiguous", 2, 1, False, True, "bf16", "plain"),
    ("striped", 2, 4, False, False, "bf16", "plain"),
    ("zigzag", 2, 2, True, False, "f32", "xla"),
    ("contiguous", 3, 1, True, True, "f32", "plain"),
    ("striped", 3, 4, False, False, "bf16", "xla"),
    ("zigzag", 3, 2, False, True, "f32", "plain"),
    ("contiguous", 8, 4, True, False, "f32", "plain"),
    ("striped", 8, 2, False, True, "bf16", "plain"),
    ("zigzag", 8, 1, False, True, "f32", "xla"),
]
TRAINED = [
    ("zigzag", 8, 2, True, True, "bf16", "xla"),
    ("striped", 8, 2, True, True, "f32", "xla"),
]
DTYPES = dict(f32="float32", bf16="bfloat16")


def test_cases_cover_every_pair_of_choices():
    values = list(CHOICES.values())
    for i, j in itertools.combinations(range(len(values)), 2):
        assert {(case[i], case[j]) for case in CASES} == set(itertools.product(values[i], values[j]))


def _check(layout, P, K, packed, causal, dtype, impl, jit):
    qkv = random_qkv(P, B, T, H, K, D, dtype=DTYPES[dtype])
    mask = dict(causal=causal, segment_ids=random_segments(1, B, T) if packed else None)
    got = results(sharded(ring_mesh(P), layout, impl=impl), qkv, jit=jit, **mask)
    assert [x.dtype for x in got] == [DTYPES[dtype]] * 4
    assert_exact(got, qkv, **mask)


@pytest.mark.parametrize(tuple(CHOICES), CASES)
def test_ring_attention_is_as_exact_as_dense_attention(layout, P, K, packed, causal, dtype, impl):
    _check(layout, P, K, packed, causal, dtype, impl, quickly)


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_ring_attention_takes_one_token_a_device(layout):
    qkv = random_qkv(1, B, 3, H, 2, D)
    assert_exact(results(sharded(ring_mesh(3), layout, impl="plain"), qkv), qkv, floor=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(tuple(CHOICES), TRAINED)
def test_ring_attention_is_exact_with_default_compilation(layout, P, K, packed, causal, dtype, impl):
    _check(layout, P, K, packed, causal, dtype, impl, jax.jit)


SHARP = [("contiguous", 4), ("zigzag", 2), ("striped", 8)]
OTHERS = [pair for pair in itertools.product(LAYOUT_KINDS, (1, 2, 4, 8)) if pair not in SHARP]


@pytest.mark.parametrize(("layout", "P"), [*SHARP, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)])
def test_ring_attention_is_exact_with_sharp_logits(layout, P):
    run = quickly(lambda q, k, v, dout: _and_gradients(sharded(ring_mesh(P), layout), q, k, v, dout))
    for deviation in (1, 10, 50):
        q, k, v, dout = random_qkv(0, 1, 256, 4, 2, 32)
        qkv = q, k * deviation, v, dout
        want = expected(qkv)
        bound = 2 * np.array(errors(dense_results(qkv), want))
        np.testing.assert_array_less(errors(run(*qkv), want), bound, err_msg=f"deviation {deviation}")


def _and_gradients(fn, q, k, v, dout):
    out, vjp = jax.vjp(fn, q, k, v)
    return out, *vjp(dout)


# --- Large rings ------------------------------------------------------------------------------------------------------


IMPLEMENTATIONS = ["plain", pytest.param("xla", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("P", "layout"), [(16, "zigzag"), (64, "striped")])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ring_attention_is_exact_in_rings_of_many_devices(P, layout, impl):
    qkv, mask = random_qkv(P, 2, 256, 4, 2, 8), dict(segment_ids=random_segments(2, 2, 256))
    got = simulate(P, qkv, layout, impl=impl, **mask)
    assert_exact(got, qkv, **mask)
    assert min(errors(got, expected(qkv))) > 0.1  # the control: documents that see each other


def _bf16_errors(P, impl):
    qkv, mask = random_qkv(3, 1, 256, 2, 1, 8, dtype="bfloat16"), dict(causal=False)
    return np.array(errors(simulate(P, qkv, impl=impl, **mask), expected(qkv, **mask)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ring_attention_bfloat16_error_does_not_grow_with_p(impl, monkeypatch):
    few, more, many = (_bf16_errors(P, impl) for P in (2, 8, 64))
    np.testing.assert_array_less(more, 1.1 * few)
    np.testing.assert_array_less(many, 1.1 * few)

    def run_in_bfloat16(self, advance, carry, first):
        def rounded(*args, **kwargs):
            return jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), advance(*args, **kwargs))

        return run(self, rounded, carry, first)

    run = ring_pass.RingPass.run
    monkeypatch.setattr(ring_pass.RingPass, "run", run_in_bfloat16)
    np.testing.assert_array_less(1.5 * few, _bf16_errors(64, impl))  # the control: sums over hops kept in bfloat16


# --- Meshes -----------------------------------------------------------------------------------------------------------


MESHES = [
    dict(dp=2, sp=2, tp=2),
    dict(fsdp=4, sp=2),
    pytest.param(dict(dp=2, fsdp=2, sp=1, tp=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_ring_attention_takes_sharded_batch_and_heads(shape):
    qkv, mask = random_qkv(4, 4, 48, 6, 2, 8), dict(segment_ids=random_segments(5, 4, 48))
    assert_exact(results(sharded(ra.make_mesh(**shape), "zigzag", impl="plain"), qkv, **mask), qkv, **mask)


def test_ring_attention_takes_axes_of_any_name_and_a_spec():
    grid = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = Mesh(grid, ("model", "rows", "ring"), axis_types=(AxisType.Auto,) * 3)
    spec = Spec("rows", "ring", "model", None)
    qkv, mask = random_qkv(6, 2, 48, 4, 2, 8), dict(segment_ids=random_segments(7, 2, 48))
    ring = sharded(mesh, "striped", axis_name="ring", spec=spec, impl="plain")
    assert_exact(results(ring, qkv, **mask), qkv, **mask)
    out = ra.ring_attention(*qkv[:3], mesh=mesh, axis_name="ring", spec=spec, impl="plain")
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), out.ndim)


def test_ring_attention_takes_a_short_spec():
    qkv = random_qkv(8, 3, 48, 4, 1, 8)
    assert_exact(results(sharded(ring_mesh(2), spec=Spec(None, "sp"), impl="plain"), qkv), qkv)


def test_ring_attention_shard_takes_replicated_keys():
    qkv = random_qkv(9, 2, 48, 4, 1, 8)  # one key/value head cannot be cut in two
    of_q, of_kv = Spec(None, "sp", "tp"), Spec(None, "sp")

    @jax.shard_map(mesh=ra.make_mesh(dp=2, sp=2, tp=2), in_specs=(of_q, of_kv, of_kv), out_specs=of_q)
    def attend(q, k, v):
        return 2 * ra.ring_attention_shard(q, k + 1, v - 1, impl="plain")

    assert_exact(results(lambda q, k, v: attend(q, k - 1, v + 1) / 2, qkv), qkv)


def test_ring_attention_takes_block_sizes_that_do_not_divide():
    blocks = ra.BlockSizes(q=7, kv=16, heads=3, cut=3)
    qkv, mask = random_qkv(10, 2, 75, 8, 4, 8), dict(segment_ids=random_segments(11, 2, 75))
    assert_exact(results(sharded(ring_mesh(2), "striped", block_sizes=blocks), qkv, **mask), qkv, **mask)


# --- Who sees whom ----------------------------------------------------------------------------------------------------


def test_ring_attention_gives_a_lone_token_its_own_value():
    q, k, v, dout = random_qkv(13, 2, 36, 4, 2, 8)
    attend = sharded(ring_mesh(3), "zigzag", impl="plain")

    @quickly
    def run(segment_ids):
        out, vjp = jax.vjp(lambda *qkv: attend(*qkv, segment_ids=segment_ids), q, k, v)
        return out, *vjp(dout)

    alone = np.tile(np.arange(36, dtype=np.int32), (2, 1))  # two hops of three are empty for every query
    out, dq, dk, dv = run(alone)
    np.testing.assert_allclose(out, np.repeat(v, 2, axis=2), rtol=1e-6)
    np.testing.assert_allclose(dv, np.asarray(dout).reshape(2, 36, 2, 2, 8).sum(3), rtol=1e-4, atol=1e-5)
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 1e-5
    _, dq, dk, _ = run(np.ones_like(alone))
    assert min(np.abs(dq).max(), np.abs(dk).max()) > 0.1  # the control: in longer documents there are gradients


LENGTH = 36
DOCUMENTS = np.repeat(np.array([[1, 2, 3, 4]], np.int32), [9, 3, 17, 7], axis=1)  # ends inside shards and at one's end
WHO_SEES = {
    "documents": dict(segment_ids=DOCUMENTS),
    "window": dict(window=4),
    "window both ways": dict(window=5, causal=False),
}


def _seen_by(token, segment_ids=None, window=None, causal=True):
    """Natural positions of the queries that may see `token`."""
    behind = np.arange(LENGTH) - token
    may = (behind >= 0) | (not causal)
    may &= np.abs(behind) < (LENGTH if window is None else window)
    return np.flatnonzero(may if segment_ids is None else may & (segment_ids[0] == segment_ids[0, token]))


@pytest.mark.parametrize(
    ("layout", "mask", "impl"),
    [
        ("contiguous", "documents", "plain"),
        ("striped", "documents", "xla"),
        ("contiguous", "window both ways", "plain"),
        ("zigzag", "window", "xla"),
    ],
)
def test_ring_attention_takes_a_token_to_those_that_see_it(layout, mask, impl):
    q, k, v, dout = random_qkv(14, 1, LENGTH, 4, 2, 8)
    attend, mask = sharded(ring_mesh(3), layout, impl=impl), WHO_SEES[mask]

    @quickly
    def run(q, k, v, dout):
        out, vjp = jax.vjp(lambda *qkv: attend(*qkv, **mask), q, k, v)
        return out, *vjp(dout)

    before, *_ = run(q, k, v, dout)
    for token in (0, 8, 9, 12, 23, 28, 35):
        after, *_ = run(q, k.at[0, token].add(1.0), v.at[0, token].add(1.0), dout)
        changed = (np.asarray(after) != np.asarray(before)).any(axis=(0, 2, 3))
        np.testing.assert_array_equal(np.flatnonzero(changed), _seen_by(token, **mask))

        # and backwards: only those in `chosen` enter the loss
        chosen = np.arange(LENGTH) == token
        _, dq, dk, dv = run(q, k, v, jnp.where(chosen[:, None, None], dout, 0))
        reached = [np.flatnonzero(np.asarray(x).any(axis=(0, 2, 3))) for x in (dq, dk, dv)]
        seen = [other for other in range(LENGTH) if token in _seen_by(other, **mask)]
        np.testing.assert_array_equal(reached[2], seen)
        assert set(reached[1]) == (set(seen) if len(seen) > 1 else set(reached[1]) & {token})
        assert set(reached[0]) <= {token}
