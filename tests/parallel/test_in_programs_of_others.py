"""Calls in programs with settings and transformations that other people use: most are traced, a few run."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from ring_helpers import quickly

import ring_attention as ra
from ring_attention.testing import random_qkv, relative_error

B, T, H, K, D = 2, 24, 4, 2, 8
SINKS = [0.0, 1.0, 0.5, 0.0]
DROPOUT = dict(dropout_rate=0.1, dropout_key=jax.random.key(0))
MASKS = {
    "weights": dict(sinks=SINKS, alibi_slopes=[1.0, 0.5, 0.25, 0.1], **DROPOUT),
    "segments": dict(segment_ids=np.arange(T)[None] // 7 + np.zeros((B, 1), int), causal=False, window=5),
}
STRATEGIES = ("ring", "all_gather", "usp", "sparse", "ring_self_attention")


def _mesh():
    return ra.make_mesh(sp=2, devices=jax.devices()[:2])


def _by(strategy, **arguments):
    options = dict(stride=4) if strategy == "sparse" else {}
    return functools.partial(ra.context_attention, mesh=_mesh(), strategy=strategy, **options, **arguments)


def _blockwise(**arguments):
    return functools.partial(ra.blockwise_attention, block_sizes=ra.BlockSizes(q=10, kv=10), **arguments)


def _decode(q, k, v):
    arguments = {name: MASKS["weights"][name] for name in ("sinks", "alibi_slopes")}
    return ra.decode_attention(q[:, :2], k, v, mesh=_mesh(), lengths=jnp.array([9, 3], jnp.int32), **arguments)


ENTRIES = {"decode": _decode}
for mask, arguments in MASKS.items():
    ENTRIES |= {f"{strategy} {mask}": _by(strategy, **arguments) for strategy in STRATEGIES}
    ENTRIES[f"blockwise {mask}"] = _blockwise(**arguments)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for part in (getattr(part, "jaxpr", part) for part in parts):
            if hasattr(part, "eqns"):
                yield from _equations(part)


@pytest.mark.parametrize("name", ENTRIES)
def test_attention_stays_in_32_bits_with_x64(name):
    operands = random_qkv(0, B, T, H, K, D)[:3]
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        with jax.enable_x64(True):
            jaxpr = jax.make_jaxpr(jax.grad(lambda *a: ENTRIES[name](*a).sum(dtype=jnp.float32), (0, 1, 2)))(*operands)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "allow")
    wide = {
        str(equation.primitive)
        for equation in _equations(jaxpr.jaxpr)
        for out in equation.outvars
        if str(getattr(out.aval, "dtype", "")) in ("int64", "float64") and out.aval.ndim
    }
    assert wide == set()


def test_ring_attention_gives_the_same_with_x64():
    q, k, v, _ = random_qkv(0, B, T, H, K, D)
    attend = quickly(lambda q, k, v: _by("ring", **DROPOUT)(q, k, v))
    want = np.asarray(attend(q, k, v))
    with jax.enable_x64(True):
        got = attend(q, k, v)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_attention_outside_jit_is_right_with_x64():
    """There loops have bounds that are known, and JAX counts in its default integer."""
    q, k, v, _ = random_qkv(0, 1, T, H, K, D)
    layout = ra.SequenceLayout("zigzag", ring_size=2)
    with jax.enable_x64(True):
        got = ra.blockwise_attention(q, k, v, block_sizes=ra.BlockSizes(q=8, kv=8))
        moved = layout.unpermute(layout.permute(jnp.asarray(q), axis=1), axis=1)
        fed = ra.blockwise_feedforward(jnp.tanh, jnp.asarray(q), chunk_size=5)
    assert got.dtype == moved.dtype == fed.dtype == np.float32
    assert relative_error(got, ra.reference_attention(q, k, v)) < 1e-6
    np.testing.assert_array_equal(moved, q)
    np.testing.assert_allclose(fed, np.tanh(q), rtol=1e-6)


@pytest.mark.parametrize(
    "attend", [_blockwise, functools.partial(_by, "ring_self_attention")], ids=["blockwise", "ring"]
)
def test_attention_gradients_let_tangents_through(attend):
    """As they do for a Hessian: forward rules must not call what has no tangent."""
    q, k, v, dq = random_qkv(0, 1, T, H, K, D)

    def slope(fn):
        return quickly(lambda q: jax.jvp(jax.grad(lambda q: (fn(q, k, v) ** 2).sum()), (q,), (dq,))[1])(q)

    assert relative_error(slope(attend(sinks=SINKS)), slope(functools.partial(_dense, lengths=None))) < 1e-5


def test_decode_attention_lets_gradients_through():
    operands = random_qkv(1, B, T, H, K, D)[:3]

    def gradients(fn):
        return quickly(jax.grad(lambda q, k, v: (fn(q[:, :2], k, v) ** 2).sum(), (0, 1, 2)))(*operands)

    mesh, lengths = _mesh(), jnp.array([9, 1], jnp.int32)
    blocks = ra.BlockSizes(kv=5)
    decode = functools.partial(
        ra.decode_attention, mesh=mesh, lengths=lengths, layout="contiguous", block_sizes=blocks, sinks=SINKS
    )
    for got, want in zip(gradients(decode), gradients(functools.partial(_dense, lengths=lengths)), strict=True):
        assert relative_error(got, want) < 1e-5


def _dense(q, k, v, lengths):
    k, v = (jnp.repeat(x, H // K, 2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    lengths = jnp.full(q.shape[0], k.shape[1]) if lengths is None else lengths
    positions = lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    seen = positions[:, None, :, None] >= jnp.arange(k.shape[1])
    e = jnp.exp(jnp.where(seen, scores, -jnp.inf))
    sinks = jnp.exp(jnp.array(SINKS))[None, :, None, None]
    return jnp.einsum("bhts,bshd->bthd", e / (e.sum(-1, keepdims=True) + sinks), v)


def test_segment_ids_may_be_any_int32():
    q, k, v, _ = random_qkv(2, 1, 15, 1, 1, D)
    ids = np.array([[-(2**31)] * 5 + [-(2**31) + 1] * 5 + [2**31 - 1] * 5], np.int32)
    attend = functools.partial(ra.blockwise_attention, causal=False, block_sizes=ra.BlockSizes(q=8, kv=8))
    got = quickly(lambda q, k, v, ids: attend(q, k, v, segment_ids=ids))(q, k, v, ids)
    want = ra.reference_attention(q, k, v, causal=False, segment_ids=ids)
    assert relative_error(got, want) < 1e-5


def test_window_beyond_all_positions_is_none():
    q, k, v, _ = random_qkv(0, B, T, H, K, D)
    ring = functools.partial(ra.ring_attention, mesh=_mesh(), segment_ids=np.zeros((B, T), np.int32))

    bounds = (2**31 - 1, 2**31, 2**63, np.int64(2**40))

    def program(attend, **bound):
        return str(jax.make_jaxpr(functools.partial(attend, **bound))(q, k, v))

    for attend, name in ((ra.blockwise_attention, "window"), (ring, "window"), (ring, "max_segment_len")):
        without = program(attend)
        for bound in bounds:
            assert program(attend, **{name: bound}) == without, (name, bound)
    decode = functools.partial(ra.decode_attention, mesh=_mesh(), lengths=jnp.array([9, 3], jnp.int32))
    for bound in bounds:
        assert jax.eval_shape(functools.partial(decode, window=bound), q[:, :1], k, v).shape == (B, 1, H, D)


def test_saved_names_keep_a_ring_from_running_twice():
    q, k, v, _ = random_qkv(0, B, T, H, K, D)
    ring = functools.partial(ra.ring_attention, mesh=_mesh())

    def permutes(fn):
        jaxpr = jax.make_jaxpr(jax.grad(lambda q, k, v: fn(q, k, v).sum(), (0, 1, 2)))(q, k, v)
        return str(jaxpr).count("ppermute")

    saved = jax.checkpoint(ring, policy=jax.checkpoint_policies.save_only_these_names(*ra.SAVED_NAMES))
    assert permutes(saved) == permutes(ring) < permutes(jax.checkpoint(ring))


def test_ring_attention_gives_the_same_when_exported():
    mesh = _mesh()
    sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))
    operands = jax.device_put(random_qkv(0, B, T, H, K, D)[:3], sharding)
    ring = jax.jit(functools.partial(ra.ring_attention, mesh=mesh))
    exported = export.export(ring)(*operands)
    if importlib.util.find_spec("flatbuffers"):  # without it JAX cannot write files
        exported = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(exported.call(*operands), ring(*operands))


def test_context_attention_suggests_the_argument_that_was_meant():
    q, k, v, _ = random_qkv(0, B, T, H, K, D)
    mesh = _mesh()
    with pytest.raises(TypeError, match=r"its options are duplex, unroll; did you mean window=\?"):
        ra.context_attention(q, k, v, mesh=mesh, windw=3)
    with pytest.raises(TypeError, match="the arguments of context_attention are mesh, strategy, "):
        ra.context_attention(q, k, v, mesh=mesh, padding=3)


@pytest.mark.parametrize("devices", [5, "cpu", [None], ["cpu:0"]])
def test_make_mesh_refuses_devices_that_are_none(devices):
    with pytest.raises(ValueError, match="must be a list of JAX's devices; give jax.devices"):
        ra.make_mesh(devices=devices)


def test_a_cache_refuses_values_narrower_than_keys():
    q, k, v, _ = random_qkv(0, B, T, H, K, D)
    refused = r"v has head_dim \(4,\) and k \(8,\), a cache needs the same; pad the narrower"
    with pytest.raises(ValueError, match=refused):
        ra.decode_attention(q[:, :1], k, v[..., :4], mesh=ra.make_mesh(sp=2, devices=jax.devices()[:2]), lengths=None)
