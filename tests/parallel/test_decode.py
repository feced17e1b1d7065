"""Attention of the newest tokens to a sharded cache, against dense attention in float64; and what its program sends."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
from ring_helpers import quickly

import ring_attention as ra
from ring_attention.attention import cached, online_softmax, sinks
from ring_attention.attention.mask import Chunks
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.parallel import decode
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.planning.hlo import compiled
from ring_attention.testing import dense_attention

B, T, H, K, D, S = 3, 2, 6, 2, 8, 80
TILES = ra.BlockSizes(kv=6)  # which divides the 80, 40, 20 and 10 slots of a device nowhere: the last one reaches back
LENGTHS = ((1, 17, S), (2, 40, 79), (0, 5, 33), (64, 3, 9))
"""Of rows that are decoded together: odd ones, full ones, an empty one, ones that leave devices without a slot."""

EXTRAS = {
    "plain": {},
    "window": dict(window=7),
    "wide_window": dict(window=41),
    "sinks": dict(sinks=np.linspace(-1, 2, H)),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi_slopes=np.geomspace(0.3, 0.003, H)),
    "scale": dict(scale=0.7),
    "all": dict(window=23, sinks=np.linspace(-1, 2, H), softcap=3.0, alibi_slopes=np.geomspace(0.3, 0.003, H)),
}


def _draw(seed, dtype="float32", B=B, T=T, H=H, K=K, S=S):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in [(B, T, H, D), (B, S, K, D), (B, S, K, D)]]


def _mesh(P, **shape):
    return ra.make_mesh(sp=P, devices=jax.devices()[: P * int(np.prod(list(shape.values())))], **shape)


def _decode(q, k, v, lengths, *, mesh, layout="striped", axis_name="sp", **settings):
    """decode_attention of caches in natural order."""
    order = ra.SequenceLayout(layout, mesh.shape[axis_name])
    k, v = (order.permute(x, 1) for x in (k, v))
    settings = dict(block_sizes=TILES) | settings
    return ra.decode_attention(q, k, v, mesh=mesh, axis_name=axis_name, lengths=lengths, layout=layout, **settings)


@functools.cache
def _dense(names):
    """Dense attention with the arguments of EXTRAS["all"], and others, that are named, as one program."""

    def attend(q, k, v, positions, **extras):
        return dense_attention(q, k, v, q_positions=positions, **extras)

    return quickly(attend, static_argnames=[name for name in names if name in ("softcap", "scale")])


def _shares(lengths_of=LENGTHS, dtype="float32", sizes=None, **settings):
    """What the error of decoding is to that of dense attention in the same dtype, over several batches of rows."""
    sizes = sizes or {}
    extras = {name: settings[name] for name in settings if name in EXTRAS["all"] or name == "scale"}
    ours = dense = 0.0
    for seed, lengths in enumerate(lengths_of):
        q, k, v = _draw(seed, dtype, **sizes)
        lengths = np.array(lengths, np.int32)
        positions = lengths[:, None] - q.shape[1] + np.arange(q.shape[1])
        want = ra.reference_attention(q, k, v, q_positions=positions, **extras)
        got = _decode(q, k, v, lengths, **settings)
        assert got.dtype == q.dtype
        ours += np.sum((np.asarray(got, np.float64) - want) ** 2)
        dense += np.sum((np.asarray(_dense(tuple(extras))(q, k, v, positions, **extras), np.float64) - want) ** 2)
    return (ours / dense) ** 0.5


@functools.cache
def _unchanged(extras, layout="striped"):
    return _shares(mesh=_mesh(4), layout=layout, **EXTRAS[extras])


# --- Exact ------------------------------------------------------------------------------------------------------------


ALONE = [("striped", name) for name in EXTRAS if name not in ("plain", "all")]


@pytest.mark.parametrize(("layout", "extras"), [*itertools.product(LAYOUT_KINDS, ("plain", "all")), *ALONE])
def test_decode_attention_is_as_exact_as_dense_attention(layout, extras):
    assert _unchanged(extras, layout) <= 2


def test_decode_attention_takes_a_mask_of_ones_own():
    q, k, v = _draw(0)
    lengths = np.array(LENGTHS[0], np.int32)
    got = _decode(q, k, v, lengths, mesh=_mesh(4), extra_mask=Chunks(16))
    positions = lengths[:, None] - T + np.arange(T)
    error = lambda size: np.abs(got - ra.reference_attention(q, k, v, q_positions=positions, extra_mask=Chunks(size)))  # noqa: E731
    assert error(16).max() < 1e-5
    assert error(15).max() > 1e-2, "the control"


@pytest.mark.parametrize(("P", "dtype"), [(1, "float16"), (8, "bfloat16")])
def test_decode_attention_is_exact_in_half_precision(P, dtype):
    assert _shares(mesh=_mesh(P), dtype=dtype, **EXTRAS["all"]) <= 2


@pytest.mark.parametrize(
    ("H", "K"), [pytest.param(4, 4, marks=pytest.mark.slow), (4, 1), pytest.param(6, 3, marks=pytest.mark.slow)]
)
def test_decode_attention_is_exact_with_any_heads_and_tokens(H, K):
    for T in (1, 5):
        assert _shares(mesh=_mesh(2), sizes=dict(H=H, K=K, T=T), window=30) <= 2


def test_decode_attention_is_exact_over_three_axes():
    mesh = _mesh(2, dp=2, tp=2)
    lengths = [(*row, 11) for row in LENGTHS]
    assert _shares(lengths, mesh=mesh, sizes=dict(B=4), **EXTRAS["all"]) <= 2


def test_decode_attention_takes_another_axis_and_spec():
    mesh = jax.make_mesh((2, 4), ("rows", "ring"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    lengths = [(*row, 11) for row in LENGTHS]
    spec = Spec("rows", "ring")
    assert _shares(lengths, mesh=mesh, axis_name="ring", spec=spec, sizes=dict(B=4), window=19) <= 2


def test_decode_attention_reads_one_layer_where_it_lies():
    q, k, v = _draw(0)
    attend = functools.partial(ra.decode_attention_shard, lengths=np.array([80, 7, 41], np.int32), block_sizes=TILES)

    @functools.partial(quickly, static_argnums=2)
    def run(k, v, layer=None):
        def on_shard(k, v):
            return attend(q, k, v, layer=None if layer is None else jnp.int32(layer))

        spec = Spec(*([None] * (k.ndim - 3)), "sp")
        return jax.shard_map(on_shard, mesh=_mesh(2), in_specs=spec, out_specs=Spec())(k, v)

    one, layers = run(k, v), [np.stack([np.full_like(x, np.nan), x]) for x in (k, v)]
    assert np.isfinite(one).all()
    assert np.array_equal(one, run(*layers, 1))
    assert np.isnan(run(*layers, 0)).all()


def test_decode_attention_takes_heads_first_and_bits():
    mesh, settings = _mesh(2, dp=2, tp=2), dict(lengths=np.array([80, 33], np.int32), block_sizes=TILES)
    q, k, v = _draw(0, B=2)
    want = ra.decode_attention(q, k, v, mesh=mesh, **settings)
    k, v = (np.swapaxes(x, 1, 2) for x in (k, v))
    assert np.array_equal(want, ra.decode_attention(q, k, v, mesh=mesh, heads_first=True, **settings))
    attend = functools.partial(ra.decode_attention_shard, heads_first=True, **settings)
    specs = dict(in_specs=(Spec(), *2 * (Spec(None, None, "sp"),)), out_specs=Spec())
    run = quickly(jax.shard_map(attend, mesh=_mesh(2), **specs))
    for dtype in ("float32", "bfloat16"):
        q, k, v = (x.astype(jnp.dtype(dtype)) for x in (q, k, v))
        assert np.array_equal(run(q, k, v), run(q, cached.as_bits(jnp.asarray(k)), cached.as_bits(jnp.asarray(v))))


def test_decode_attention_is_zero_where_a_row_sees_nothing():
    q, k, v = _draw(0)
    lengths = np.array([0, 1, 30], np.int32)
    out = np.asarray(_decode(q, k, v, lengths, mesh=_mesh(4)))
    assert not out[0].any()
    assert not out[1, 0].any(), "the row's newest token but one was never there"
    assert out[1, 1].any()
    unused = (np.arange(S) >= lengths[:, None])[..., None, None]
    changed = _decode(q, *(np.where(unused, np.float32(1e4), x) for x in (k, v)), lengths, mesh=_mesh(4))
    assert np.array_equal(out, changed)
    within = (np.arange(S) == lengths[:, None] - 1)[..., None, None]
    control = _decode(q, *(np.where(within, np.float32(1e4), x) for x in (k, v)), lengths, mesh=_mesh(4))
    assert not np.array_equal(out[1:], control[1:])


def test_striped_cache_begins_with_what_was_prefilled():
    q, k, v = _draw(0)
    lengths = np.array([80, 7, 41], np.int32)
    layout = ra.SequenceLayout("striped", 4)
    k, v = (layout.permute(x, 1).reshape(B, 4, -1, K, D) for x in (k, v))
    larger = (np.pad(x, ((0, 0), (0, 0), (0, 13), (0, 0), (0, 0))).reshape(B, -1, K, D) for x in (k, v))
    small, large = (
        ra.decode_attention(q, *caches, mesh=_mesh(4), lengths=lengths)
        for caches in ((x.reshape(B, -1, K, D) for x in (k, v)), larger)
    )
    assert np.allclose(small, large, rtol=1e-6, atol=1e-6)


# --- Mutants: mistakes that the comparison must see -------------------------------------------------------------------


def _sinks_on_every_device(patch):
    def mutant(state, sinks_H):
        return finalize(state, None if sinks_H is None else sinks_H + np.log(4.0))

    finalize = sinks.finalize
    patch.setattr(sinks, "finalize", mutant)


def _devices_count_alike(patch):
    def mutant(state, axis_name):
        everyone = lax.all_gather(online_softmax.finalize(state)[0], axis_name, to="invarying")
        alike = jnp.ones(everyone.shape[1:-1])
        return SoftmaxState(everyone.mean(0), 0 * alike, alike)

    patch.setattr(decode, "_merged", mutant)


def _own_part_alone(patch):
    def mutant(state, axis_name):
        return SoftmaxState(*(lax.all_gather(x, axis_name, to="invarying")[0] for x in state))

    patch.setattr(decode, "_merged", mutant)


def _positions_of_another_layout(patch):
    positions = ra.SequenceLayout.shard_positions
    other = lambda self, *args: positions(ra.SequenceLayout("contiguous", self.ring_size), *args)  # noqa: E731
    patch.setattr(ra.SequenceLayout, "shard_positions", other)


def _queries(shift):
    def mutate(patch):
        attend = cached.attend_cached
        mutant = lambda *args, q_positions, **rest: attend(*args, q_positions=q_positions + shift, **rest)  # noqa: E731
        patch.setattr(decode, "attend_cached", mutant)

    return mutate


def _slots_that_were_taken_count_again(patch):
    patch.setattr(cached, "FARTHEST", 0)


def _first_tile_is_left_out(patch):
    visited = cached._visited

    def mutant(*args):
        found = visited(*args)
        return found._replace(items=jnp.roll(found.items, -1), count=found.count - 1)

    patch.setattr(cached, "_visited", mutant)


def _window_is_one_too_wide(patch):
    make = decode.make_mask_spec
    patch.setattr(decode, "make_mask_spec", lambda *a, window, **kw: make(*a, window=window + 1, **kw))


MUTANTS = {
    "sinks on every device": (_sinks_on_every_device, "sinks"),
    "devices count alike": (_devices_count_alike, "plain"),
    "own part alone": (_own_part_alone, "plain"),
    "positions of another layout": (_positions_of_another_layout, "plain"),
    "the newest token is not seen": (_queries(-1), "plain"),
    "a token that is still to come is seen": (_queries(1), "plain"),
    "slots that were taken count again": (_slots_that_were_taken_count_again, "plain"),
    "the first tile is left out": (_first_tile_is_left_out, "plain"),
    "window is one too wide": (_window_is_one_too_wide, "window"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_decode_attention_mutants_are_seen(mutant, monkeypatch):
    mutate, extras = MUTANTS[mutant]
    assert _unchanged(extras) <= 2
    mutate(monkeypatch)
    decode._sharded.cache_clear()
    assert _shares(mesh=_mesh(4), **EXTRAS[extras]) > 1000
    decode._sharded.cache_clear()


# --- What is sent and held --------------------------------------------------------------------------------------------

SLOTS = 384  # of a device; neither it nor a tile of it is the size of anything else


@functools.cache
def _compiled(P, rows=2, new=1, window=None, **shape):
    mesh = _mesh(P, **shape)
    by_slot, whole = NamedSharding(mesh, Spec(("dp", "fsdp"), "sp", "tp")), NamedSharding(mesh, Spec(None, None, "tp"))
    k = jax.ShapeDtypeStruct((rows, P * SLOTS, K, D), "float32", sharding=by_slot)
    q = jax.ShapeDtypeStruct((rows, new, H, D), "float32", sharding=whole)
    lengths = jax.ShapeDtypeStruct((rows,), "int32")
    attend = functools.partial(ra.decode_attention, mesh=mesh, window=window, block_sizes=ra.BlockSizes(kv=32))
    return jax.jit(lambda q, k, v, lengths: attend(q, k, v, lengths=lengths)).lower(q, k, k, lengths).compile()


def _gather(P, rows, new, heads):
    """The one collective: float32 outputs and lse of every device."""
    return {"all-gather": (1, P * rows * new * heads * (D + 1) * 4)}


@pytest.mark.parametrize("P", [2, 8])
def test_decode_attention_sends_one_small_gather(P):
    assert compiled.totals(_compiled(P).as_text()) == _gather(P, 2, 1, H)
    if P == 2:
        assert compiled.totals(_compiled(P, new=3, window=50).as_text()) == _gather(P, 2, 3, H)


def test_decode_attention_sends_nothing_on_one_device():
    program = _compiled(2, rows=4, dp=2, tp=2).as_text()
    assert compiled.totals(program) == _gather(2, 2, 1, H // 2)
    assert compiled.sent(program) > 0
    assert compiled.sent(_compiled(1).as_text()) == 0


def _gathering(P):
    """The control: the cache comes to the queries."""
    mesh, spec = _mesh(P), Spec(None, "sp")
    k = jax.ShapeDtypeStruct((2, P * SLOTS, K, D), "float32", sharding=NamedSharding(mesh, spec))
    q = jax.ShapeDtypeStruct((2, 1, H, D), "float32")

    def attend(q, k, v):
        k, v = (lax.all_gather(x, "sp", axis=1, tiled=True, to="invarying") for x in (k, v))
        return dense_attention(q, k, v, causal=False)

    run = jax.shard_map(attend, mesh=mesh, in_specs=(Spec(), spec, spec), out_specs=Spec())
    return jax.jit(run).lower(q, k, k).compile()


def test_decode_attention_memory_does_not_grow_with_the_ring():
    cache = 2 * 2 * SLOTS * K * D * 4  # bytes of a device's
    temporary = {P: _compiled(P).memory_analysis().temp_size_in_bytes for P in (2, 8)}
    parts = 2 * H * (D + 1) * 4  # bytes of what one device makes of its slots
    assert temporary[8] - temporary[2] < 4 * 6 * parts, "a few copies of what was gathered"
    assert temporary[8] < cache / 4
    assert all(8 * SLOTS not in array.shape for array in compiled.arrays(_compiled(8).as_text()))
    control = _gathering(8)
    assert control.memory_analysis().temp_size_in_bytes > 8 * cache
    assert any(8 * SLOTS in array.shape for array in compiled.arrays(control.as_text()))


def test_decode_attention_skips_tiles_that_no_row_sees():
    def tiles(lengths, me, **settings):
        mask = decode.make_mask_spec(
            jnp.zeros((1, 1, H, D)),
            **dict.fromkeys(("softcap", "scale", "alibi_slopes", "dropout_key", "window")) | settings,
            causal=True,
            dropout_rate=0.0,
        )
        positions = ra.SequenceLayout("striped", 4).shard_positions(me, 64)[None]
        found = cached._visited(mask, jnp.array(lengths)[:, None] - 1, positions, 16)
        return found.items[: found.count].tolist()

    assert tiles([256, 9], 0) == [0, 1, 2, 3]
    assert tiles([9, 65], 0) == [0, 1]
    assert tiles([9, 65], 1) == [0], "of positions 0 to 64 device 1 holds 16"
    assert tiles([200, 9], 0, window=20) == [0, 2, 3]
    assert tiles([0, 1], 3) == []


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(lengths=np.array([1, 2], np.int32)), "lengths has shape (2,), need [B=3]"),
        (dict(lengths=np.array([1, 2, 81], np.int32)), "lengths holds 81, need 0 to 80"),
        (dict(lengths=np.array([1, 2, -1], np.int32)), "lengths holds -1, need 0 to 80"),
        (dict(lengths=np.ones(3, np.float32)), "lengths has dtype float32, need integers"),
        (dict(impl="splash"), "impl='splash' computes whole shards, not a few queries; use impl=\"auto\""),
        (dict(impl="fast"), "impl='fast' is not known"),
        (dict(layout="round"), "layout='round' is not known"),
        (dict(layout=ra.SequenceLayout("striped", 8)), "layout is for ring_size=8, but the mesh axis has 4 devices"),
        (dict(axis_name="seq"), "axis_name='seq' is not an axis of the mesh"),
        (dict(window=0), "window=0 must be a whole number of tokens"),
        (dict(sinks=np.zeros(2)), "sinks has shape (2,), need [H=6]"),
        (dict(mesh=None), "mesh is left out, but none is set; give mesh=make_mesh(sp=...)"),
        (dict(heads_first=True), "q has H=6 heads and k has K=80"),
        (dict(sizes=dict(S=81)), "seq_len=81 is not divisible by the ring size sp=4"),
        (dict(sizes=dict(T=81)), "q holds T=81 new tokens, the cache has S=80 slots"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_decode_attention_refuses_mistakes_in_one_line(change, words):
    change = dict(change)
    settings = dict(mesh=_mesh(4), lengths=np.array([1, 2, 3], np.int32)) | change
    arrays = _draw(0, **settings.pop("sizes", {}))
    with pytest.raises(ValueError, match=".") as error:
        ra.decode_attention(*arrays, **settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
