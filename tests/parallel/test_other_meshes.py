"""Meshes that are not make_mesh's: Explicit and mixed axes, other names, abstract or left out, a shard_map around."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, get_abstract_mesh
from jax.sharding import PartitionSpec as P
from ring_helpers import quickly

import ring_attention as ra
from ring_attention.attention import blockwise
from ring_attention.testing import dense_errors, errors, oracle

pytestmark = pytest.mark.usefixtures("plain_kernel")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
COLLECTIVES = "all-gather|all-reduce|collective-permute|all-to-all"
NAMES = ("dp", "sp", "tp")


def _mesh(names=NAMES, sizes=(2, 2, 2), types=EXPLICIT):
    types = (types,) * len(names) if isinstance(types, AxisType) else types
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, names, axis_types=types)


def _qkv(tokens=16, batch=2):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, tokens, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4)]


def _put(mesh, arrays, *spec):
    return [jax.device_put(x, NamedSharding(mesh, P(*spec))) for x in arrays]


def _assert_close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-6)


def _shapes(mesh=None, spec=None, batch=2):
    sharding = None if mesh is None else NamedSharding(mesh, spec or P())
    return [jax.ShapeDtypeStruct((batch, 16, heads, 8), jnp.float32, sharding=sharding) for heads in (4, 2, 2)]


# --- Types of axes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [EXPLICIT, (EXPLICIT, AUTO, EXPLICIT), (AUTO, EXPLICIT, AUTO)])
def test_context_attention_is_exact_with_any_axis_types(types):
    mesh, (*qkv, dout) = _mesh(types=types), _qkv()
    ids = jnp.asarray([[0] * 5 + [1] * 11, [3] * 16])

    @quickly
    def run(qkv, dout, ids):
        def fn(q, k, v):
            out = ra.ring_attention(q, k, v, layout="striped", segment_ids=ids)
            return ra.SequenceLayout("striped", 2).unpermute(out, 1)

        out, vjp = jax.vjp(fn, *qkv)
        return out, *vjp(dout)

    layout = ra.SequenceLayout("striped", 2)
    with jax.set_mesh(mesh):
        placed = _put(mesh, qkv, *NAMES)
        got = run([layout.permute(x, 1) for x in placed], *_put(mesh, [dout], *NAMES), layout.permute(ids, 1))
    got = [got[0], *(layout.unpermute(np.asarray(x), 1) for x in got[1:])]
    mask = dict(segment_ids=np.asarray(ids))
    limits = dense_errors(*qkv, dout, **mask)
    for error, limit in zip(errors(got, oracle(*qkv, dout, **mask)), limits, strict=True):
        assert error <= 2 * limit
    assert max(errors([got[0] * 1.001, *got[1:]], oracle(*qkv, dout, **mask))) > 2 * max(limits)  # the control


def test_context_attention_shards_results_like_the_spec():
    mesh, whole = _mesh(), P(*NAMES, None)
    spec_of = lambda fn, *args: jax.typeof(jax.eval_shape(fn, *args)).sharding.spec  # noqa: E731
    ring = lambda q, k, v: ra.ring_attention(q, k, v, mesh=mesh)  # noqa: E731
    assert spec_of(ring, *_shapes(mesh, P(*NAMES))) == whole
    assert spec_of(ring, *_shapes(mesh, P(None, "sp"))) == whole  # what was not sharded is, as by default
    with jax.set_mesh(mesh):
        assert spec_of(ring, *_shapes(mesh)) == whole
        assert spec_of(lambda q, k, v: q + ra.ring_attention(q, k, v), *_shapes(mesh, P(*NAMES))) == whole
        of_part = _shapes(mesh, P(None, "sp"))[0]
        assert spec_of(lambda x: ra.SequenceLayout("zigzag", 2).permute(x, 1), of_part) == P(None, "sp", None, None)
        out, lse = jax.eval_shape(lambda *x: ra.blockwise_attention(*x, return_lse=True), *_shapes(mesh, P(*NAMES)))
        assert (out.sharding.spec, lse.sharding.spec) == (whole, P(*NAMES))
    assert spec_of(ring, *_shapes()) == P(None, None, None, None)  # arrays without types stay so: no context, no rules


def test_context_attention_takes_unplaced_arrays_of_any_length():
    mesh, (*qkv, _) = _mesh(("sp",), (8,)), _qkv(tokens=13)
    got = ra.ring_attention(*qkv, mesh=mesh)
    _assert_close(got, ra.reference_attention(*qkv))
    placed = _put(mesh, qkv)
    in_jit = jax.jit(lambda q, k, v: ra.ring_attention(q, k, v, mesh=mesh))
    _assert_close(in_jit(*placed), ra.reference_attention(*qkv))
    with jax.set_mesh(mesh):
        assert jax.eval_shape(in_jit, *placed).sharding.spec == P(None, None, None, None)  # 13 tokens have no shards


def test_decode_attention_takes_caches_with_types_and_without():
    mesh, (q, k, v, _) = _mesh(("dp", "sp"), (2, 4)), _qkv()
    lengths = jnp.asarray([3, 16])
    decode = quickly(lambda q, k, v, n: ra.decode_attention(q, k, v, lengths=n, layout="contiguous"))
    new = q[:, -1:]
    with jax.set_mesh(mesh):
        plain = decode(new, k, v, lengths)
        placed = decode(new, *_put(mesh, (k, v), "dp", "sp"), lengths)
    assert placed.sharding.spec == P("dp", None, None, None)
    for got in map(np.asarray, (plain, placed)):
        _assert_close(got[1:], ra.reference_attention(q[1:], k[1:], v[1:])[:, -1:])
        _assert_close(got[:1], ra.reference_attention(new[:1], k[:1, :3], v[:1, :3], causal=False))


def test_flax_attention_fn_folds_sharded_leading_axes():
    mesh, (*qkv, _) = _mesh(("dp", "sp"), (2, 4)), _qkv(batch=4)
    folded = [x.reshape(2, 2, *x.shape[1:]) for x in qkv]
    got = ra.flax_attention_fn(mesh=mesh)(*_put(mesh, folded, None, "dp"))
    assert got.sharding.spec == P(None, "dp", "sp", None, None)
    _assert_close(np.asarray(got).reshape(4, 16, 4, 8), ra.reference_attention(*qkv))


# --- Which mesh -------------------------------------------------------------------------------------------------------


def test_context_attention_takes_a_set_abstract_or_equal_mesh():
    ours, theirs = ra.make_mesh(sp=8), _mesh(("sp",), (8,))
    shape = lambda **arguments: jax.eval_shape(lambda *x: ra.ring_attention(*x, **arguments), *_shapes()).shape  # noqa: E731
    for mesh in (ours, theirs):
        with jax.set_mesh(mesh):
            assert shape() == shape(mesh=ours) == shape(mesh=theirs) == shape(mesh=get_abstract_mesh()) == (2, 16, 4, 8)
    for types in (AUTO, EXPLICIT):
        abstract = AbstractMesh((4, 2), ("sp", "dp"), axis_types=(types, types))
        assert shape(mesh=abstract) == (2, 16, 4, 8)
        fn = jax.jit(lambda *x, mesh=abstract: ra.ring_attention(*x, mesh=mesh))
        assert "sdy" in fn.trace(*_shapes(abstract, P("dp", "sp"))).lower(lowering_platforms=("cpu",)).as_text()


def test_context_attention_takes_a_mesh_inside_another():
    ours, theirs, (*qkv, _) = ra.make_mesh(dp=2, sp=4), _mesh(("sp",), (8,)), _qkv()
    with jax.set_mesh(theirs):
        got = jax.jit(lambda *x: 1 * ra.ring_attention(*x, mesh=ours))(*_put(theirs, qkv, None, "sp"))
        assert got.sharding.spec == P(None, "sp", None, None)
    _assert_close(got, ra.reference_attention(*qkv))


def test_context_attention_runs_inside_a_shard_map():
    mesh, (*qkv, dout) = _mesh(("dp", "sp"), (2, 4), AUTO), _qkv()

    @quickly
    def run(qkv, dout):
        inner = lambda q, k, v: ra.ring_attention(q, k, v, mesh=mesh)  # noqa: E731
        fn = jax.shard_map(inner, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"), axis_names={"dp"})
        out, vjp = jax.vjp(fn, *qkv)
        return out, *vjp(dout)

    for got, want in zip(run(qkv, dout), oracle(*qkv, dout), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def _around(axes, **arguments):
    mesh = _mesh(("dp", "sp"), (2, 4), AUTO)
    inner = lambda q, k, v: ra.ring_attention(q, k, v, mesh=mesh, **arguments)  # noqa: E731
    specs = P(*sorted(axes))
    return jax.eval_shape(
        jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=specs, axis_names=axes), *_shapes(batch=8)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ra.ring_attention(*_qkv()[:3]), "mesh is left out, but none is set; give mesh=make_mesh(sp=...)"),
        (lambda: _around({"dp"}, spec=P("dp", "sp")), "names 'dp', which a shard_map around this call goes over"),
        (lambda: _around({"dp", "sp"}), "call context_attention_shard"),
    ],
)
def test_context_attention_refuses_meshes_in_one_line(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)


def test_context_attention_refuses_a_mesh_of_other_devices():
    with jax.set_mesh(ra.make_mesh(sp=8)), pytest.raises(ValueError, match="mesh has 4 devices, but the one set by"):
        ra.ring_attention(*_qkv()[:3], mesh=_mesh(("sp",), (4,)))


# --- Names of axes ----------------------------------------------------------------------------------------------------

OTHERS = ("data", "sp", "tensor")


def test_default_spec_takes_a_known_sharding_of_other_names():
    placed = P("data", "sp", "tensor", None)
    for types in (EXPLICIT, AUTO):
        mesh, (*qkv, _) = _mesh(OTHERS, types=types), _qkv()
        got = ra.ring_attention(*_put(mesh, qkv, *OTHERS), mesh=mesh)
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, placed), 4)
        _assert_close(got, ra.reference_attention(*qkv))


def test_default_spec_refuses_other_names_with_a_remedy():
    mesh = _mesh(OTHERS, types=AUTO)
    shapes = _shapes(mesh, P(*OTHERS))
    ring = lambda spec: lambda *x: ra.ring_attention(*x, mesh=mesh, spec=spec)  # noqa: E731
    decode = lambda q, k, v: ra.decode_attention(q[:, :1], k, v, lengths=jnp.zeros(2, int), mesh=mesh)  # noqa: E731
    right = "spec=PartitionSpec('data', 'sp', 'tensor', None)"
    for fn in (ring(None), decode, lambda *x: ra.flax_attention_fn(mesh=mesh)(*x)):
        with pytest.raises(ValueError, match=re.escape(right)):
            jax.eval_shape(fn, *shapes)
    text = quickly(ring(P("data", "sp", "tensor", None))).lower(*shapes).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text


def test_default_spec_needs_no_help_with_axes_of_one_device():
    for names, sizes in ((("x", "seq"), (1, 8)), (("seq",), (8,))):
        mesh = _mesh(names, sizes, AUTO)
        fn = lambda *x, mesh=mesh: ra.ring_attention(*x, mesh=mesh, axis_name="seq")  # noqa: E731
        assert jax.eval_shape(fn, *_shapes()).shape == (2, 16, 4, 8)


# --- Attention without a ring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("types", "names"), [(AUTO, ("dp", "tp")), (EXPLICIT, ("data", "model"))])
def test_blockwise_attention_keeps_batch_and_heads_in_place(types, names, monkeypatch):
    """With tiles: it is their loop for which XLA would gather everything."""
    mesh = _mesh(names, (4, 2), types)
    q, k, v = _shapes(mesh, P(names[0], None, names[1]), batch=8)

    def attend(q, k, v):
        return ra.blockwise_attention(q, k, v, impl="tiles")

    def both(q, k, v):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(out)

    program = quickly(both).lower(q, k, v).compile()
    assert not re.search(COLLECTIVES, program.as_text())
    assert all(s.spec[:3] == (names[0], None, names[1]) for s in program.output_shardings)
    monkeypatch.setattr(blockwise, "shards_of", lambda *_: None)
    assert re.search(COLLECTIVES, quickly(attend).lower(q, k, v).compile().as_text())  # the control


def test_blockwise_attention_shards_arguments_with_their_axes():
    mesh, (*qkv, dout) = _mesh(("dp", "tp"), (4, 2), AUTO), _qkv(batch=4)
    ids = jnp.asarray([[0] * 5 + [1] * 11, [3] * 16, [0] * 16, [1] * 9 + [2] * 7])
    of_heads = jnp.asarray([0.1, 0.4, 0.2, 0.3])
    options = dict(segment_ids=ids, alibi_slopes=of_heads, dropout_rate=0.3, dropout_key=jax.random.key(1))

    @quickly
    def run(qkv, sinks, dout):
        out, vjp = jax.vjp(lambda sinks, *x: ra.blockwise_attention(*x, sinks=sinks, **options), sinks, *qkv)
        return out, *vjp(dout)

    placed = _put(mesh, [*qkv, dout], "dp", None, "tp")
    for got, want in zip(run(placed[:3], of_heads, placed[3]), run(qkv, of_heads, dout), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
    eager = ra.blockwise_attention(*_put(_mesh(OTHERS), qkv, "data", None, "tensor"), q_positions=jnp.arange(16)[None])
    assert eager.sharding.spec == P("data", None, "tensor", None)
    _assert_close(np.asarray(eager), ra.reference_attention(*qkv))


def test_blockwise_attention_says_what_it_gathers(caplog):
    mesh = _mesh(("rows", "tp", "columns"), types=AUTO)
    for _ in range(2):
        jax.eval_shape(ra.blockwise_attention, *_shapes(mesh))
    (record,) = caplog.records
    assert "what mesh axes 'columns', 'rows' shard is not known" in record.getMessage()
    jax.eval_shape(ra.blockwise_attention, *_shapes(_mesh(types=EXPLICIT), P("dp", None, "tp")))
    assert len(caplog.records) == 1


# --- Feed-forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [AUTO, EXPLICIT])
@pytest.mark.parametrize("chunk_size", [32, 40])
def test_blockwise_feedforward_keeps_sharded_tokens_in_place(types, chunk_size):
    mesh, up = _mesh(("sp",), (8,), types), np.ones((8, 32), np.float32)
    x = jax.ShapeDtypeStruct((1, 256, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "sp")))

    def both(x):
        out, vjp = jax.vjp(
            lambda x: ra.blockwise_feedforward(lambda x: jnp.sin(x @ up) @ up.T, x, chunk_size=chunk_size), x
        )
        return out, *vjp(x)

    program = quickly(both).lower(x).compile()
    assert not re.search(COLLECTIVES, program.as_text())
    assert all(s.spec[:2] == (None, "sp") for s in program.output_shardings)


def test_blockwise_feedforward_takes_a_token_of_each_device():
    mesh, (x, *_) = _mesh(("sp",), (8,)), _qkv()
    rows = x.reshape(2, 16, 32)
    seen = []

    def fn(x):
        seen.append(x.shape)
        return jnp.sin(x)

    got = ra.blockwise_feedforward(fn, *_put(mesh, [rows], None, "sp"), chunk_size=2)
    assert set(seen) == {(2, 8, 32)}
    assert got.sharding.spec[:2] == (None, "sp")
    _assert_close(got, np.sin(rows))
