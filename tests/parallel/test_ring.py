import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from oracle import (
    NAMES,
    assert_as_exact_as_dense,
    dense_errors,
    errors,
    oracle,
    out_and_gradients,
    random_qkv,
    random_segments,
    relative_error,
)

import ring_attention as ra
from ring_attention.attention import kernels, online_softmax
from ring_attention.attention.kernels.contract import Kernel, Whole
from ring_attention.parallel import ring
from ring_attention.parallel.layouts import LAYOUT_KINDS

# Every size is another, so that swapped axes cannot pass.
B, T, H, D = 3, 80, 4, 8

CHOICES = dict(
    layout=LAYOUT_KINDS, P=(1, 2, 4, 8), K=(4, 2, 1), packed=(False, True), causal=(True, False), dtype=("f32", "bf16")
)
CASES = [
    ("contiguous", 1, 2, True, True, "bf16"),
    ("striped", 1, 1, True, False, "f32"),
    ("zigzag", 1, 4, False, True, "bf16"),
    ("contiguous", 2, 1, False, True, "bf16"),
    ("striped", 2, 4, False, False, "bf16"),
    ("zigzag", 2, 2, True, False, "f32"),
    ("contiguous", 4, 1, True, True, "f32"),
    ("striped", 4, 4, False, False, "bf16"),
    ("zigzag", 4, 2, False, True, "f32"),
    ("contiguous", 8, 4, True, False, "f32"),
    ("striped", 8, 2, False, True, "bf16"),
    ("zigzag", 8, 1, False, True, "f32"),
    # Every pair of choices stands above; these are the ones that people train with.
    ("zigzag", 8, 2, True, True, "bf16"),
    ("striped", 8, 2, True, True, "f32"),
    ("contiguous", 8, 2, True, True, "bf16"),
]
DTYPES = dict(f32="float32", bf16="bfloat16")


def _ring_mesh(size):
    return ra.make_mesh(sp=size, devices=jax.devices()[:size])


def _sharded(mesh, layout="contiguous", segments=None, axis_name="sp", **kwargs):
    """ra.ring_attention as a function of arrays in natural order."""
    layout = ra.SequenceLayout(layout, mesh.shape[axis_name])
    kwargs |= dict(mesh=mesh, axis_name=axis_name, layout=layout)
    kwargs |= dict(segment_ids=None if segments is None else layout.permute(segments, 1))

    def attend(q, k, v):
        return layout.unpermute(ra.ring_attention(*(layout.permute(x, 1) for x in (q, k, v)), **kwargs), 1)

    return attend


def _simulate(P, q, k, v, dout, layout="contiguous", segments=None, **kwargs):
    """(out, dq, dk, dv) in natural order, from a ring of any size on one device."""
    layout = ra.SequenceLayout(layout, P)

    # JAX cannot batch a custom backward pass that names the axis in a loop, so the gradient is taken on each shard.
    def on_shard(q, k, v, dout, segment_ids):
        attend = functools.partial(ra.ring_attention_shard, segment_ids=segment_ids, layout=layout, **kwargs)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    def deal(x):
        return layout.permute(x, 1).reshape(x.shape[0], P, -1, *x.shape[2:])

    in_axes = (1, 1, 1, 1, None if segments is None else 1)
    run = jax.jit(jax.vmap(on_shard, in_axes=in_axes, out_axes=1, axis_name="sp"))
    got = run(*map(deal, (q, k, v, dout)), None if segments is None else deal(segments))
    return [layout.unpermute(x.reshape(like.shape), 1) for x, like in zip(got, (q, q, k, v), strict=True)]


def test_the_cases_cover_every_pair_of_choices():
    values = list(CHOICES.values())
    for i, j in itertools.combinations(range(len(values)), 2):
        assert {(case[i], case[j]) for case in CASES} == set(itertools.product(values[i], values[j]))


@pytest.mark.parametrize(("layout", "P", "K", "packed", "causal", "dtype"), CASES)
def test_is_as_exact_as_dense_attention_in_the_same_dtype(layout, P, K, packed, causal, dtype):
    qkv = random_qkv(P, B, T, H, K, D, dtype=DTYPES[dtype])
    segments = random_segments(1, B, T) if packed else None
    got = out_and_gradients(_sharded(_ring_mesh(P), layout, segments, causal=causal), *qkv)
    assert [x.dtype for x in got] == [x.dtype for x in (qkv[0], *qkv[:3])]
    assert_as_exact_as_dense(got, *qkv, causal=causal, segment_ids=segments)


# --- Large rings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("P", "layout"), [(16, "zigzag"), (64, "striped")])
def test_rings_larger_than_the_machine_are_exact_to_rounding(P, layout):
    qkv = random_qkv(P, 2, 256, 4, 2, 8)
    segments = random_segments(2, 2, 256)
    got, mask = _simulate(P, *qkv, layout, segments), dict(segment_ids=segments)
    bounds = 2 * np.array(dense_errors(*qkv, **mask))
    np.testing.assert_array_less(errors(got, oracle(*qkv, **mask)), bounds)
    np.testing.assert_array_less(1000 * bounds, errors(got, oracle(*qkv)))  # the control: documents that leak


def _bf16_errors(P):
    qkv = random_qkv(3, 1, 256, 2, 1, 8, dtype="bfloat16")
    return np.array(errors(_simulate(P, *qkv, causal=False), oracle(*qkv, causal=False)))


def test_the_error_of_bfloat16_does_not_grow_with_the_ring(monkeypatch):
    few, more, many = (_bf16_errors(P) for P in (2, 8, 64))
    np.testing.assert_array_less(more, 1.1 * few)
    np.testing.assert_array_less(many, 1.1 * few)

    def scan_in_bfloat16(self, body, carry, steps):
        def round_tree(tree):
            return jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype) if x.ndim == 4 else x, tree)

        return scan(self, lambda carry, step: round_tree(body(carry, step)), carry, steps)

    scan = ring._Ring.scan
    monkeypatch.setattr(ring._Ring, "scan", scan_in_bfloat16)
    np.testing.assert_array_less(1.5 * few, _bf16_errors(64))  # the control: sums over hops kept in bfloat16


# --- Meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [dict(dp=2, sp=2, tp=2), dict(fsdp=2, sp=4), dict(dp=2, fsdp=2, sp=1, tp=2)], ids=str)
def test_batch_and_heads_may_be_sharded_as_well(shape):
    mesh = ra.make_mesh(**shape)
    qkv = random_qkv(4, 4, 48, 6, 2, 8)
    segments = random_segments(5, 4, 48)
    got = out_and_gradients(_sharded(mesh, "zigzag", segments), *qkv)
    assert_as_exact_as_dense(got, *qkv, segment_ids=segments)


def test_axes_of_any_name_with_a_spec_of_your_own_and_the_result_is_sharded_like_q():
    grid = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = Mesh(grid, ("model", "rows", "ring"), axis_types=(AxisType.Auto,) * 3)
    spec = Spec("rows", "ring", "model", None)
    qkv = random_qkv(6, 2, 48, 4, 2, 8)
    segments = random_segments(7, 2, 48)
    got = out_and_gradients(_sharded(mesh, "striped", segments, axis_name="ring", spec=spec), *qkv)
    assert_as_exact_as_dense(got, *qkv, segment_ids=segments)
    out = ra.ring_attention(*qkv[:3], mesh=mesh, axis_name="ring", spec=spec)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), out.ndim)


def test_a_short_spec_leaves_the_other_axes_whole():
    qkv = random_qkv(8, 3, 48, 4, 1, 8)
    got = out_and_gradients(_sharded(_ring_mesh(2), spec=Spec(None, "sp")), *qkv)
    assert_as_exact_as_dense(got, *qkv)


def test_inside_your_own_shard_map_keys_may_be_replicated_where_queries_are_sharded():
    mesh = ra.make_mesh(dp=2, sp=2, tp=2)
    qkv = random_qkv(9, 2, 48, 4, 1, 8)  # one key/value head cannot be cut in two
    of_q, of_kv = Spec(None, "sp", "tp"), Spec(None, "sp")

    @jax.shard_map(mesh=mesh, in_specs=(of_q, of_kv, of_kv), out_specs=of_q)
    def attend(q, k, v):
        return 2 * ra.ring_attention_shard(q, k + 1, v - 1)

    got = out_and_gradients(lambda q, k, v: attend(q, k - 1, v + 1) / 2, *qkv)
    assert_as_exact_as_dense(got, *qkv)


@pytest.mark.parametrize("blocks", [ra.BlockSizes(q=7, kv=3, heads=2), ra.BlockSizes(q=3, kv=16, heads=3)], ids=str)
def test_block_sizes_that_do_not_divide_change_nothing(blocks):
    qkv = random_qkv(10, 2, 80, 8, 4, 8)
    segments = random_segments(11, 2, 80)
    got = out_and_gradients(_sharded(_ring_mesh(4), "striped", segments, block_sizes=blocks), *qkv)
    assert_as_exact_as_dense(got, *qkv, segment_ids=segments)


def test_scale_is_honoured():
    qkv = random_qkv(12, 1, 16, 2, 1, 8)
    got = ra.ring_attention(*qkv[:3], mesh=_ring_mesh(2), scale=0.5)
    assert relative_error(got, ra.reference_attention(*qkv[:3], scale=0.5)) < 1e-6
    assert relative_error(got, ra.reference_attention(*qkv[:3])) > 1e-2


# --- Who sees whom ----------------------------------------------------------------------------------------------------


def test_a_document_of_one_token_gets_its_own_value_and_has_no_gradient_but_that():
    q, k, v, dout = random_qkv(13, 2, 32, 4, 2, 8)
    alone = np.tile(np.arange(32, dtype=np.int32), (2, 1))  # three hops of four are empty for every query
    out, dq, dk, dv = out_and_gradients(_sharded(_ring_mesh(4), "zigzag", alone), q, k, v, dout)
    np.testing.assert_allclose(out, np.repeat(v, 2, axis=2), rtol=1e-6)
    np.testing.assert_allclose(dv, np.asarray(dout).reshape(2, 32, 2, 2, 8).sum(3), rtol=1e-4, atol=1e-5)
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 1e-5
    _, dq, dk, _ = out_and_gradients(_sharded(_ring_mesh(4), "zigzag"), q, k, v, dout)
    assert min(np.abs(dq).max(), np.abs(dk).max()) > 0.1  # the control: in longer documents there are gradients


LENGTH = 32
DOCUMENTS = np.repeat(np.array([[1, 2, 3, 4]], np.int32), [9, 4, 13, 6], axis=1)  # ends inside shards and at one's end


def _seen_by(token, packed):
    """Natural positions of the queries that may see `token`."""
    later = np.arange(LENGTH) >= token
    return np.flatnonzero(later & (DOCUMENTS[0] == DOCUMENTS[0, token]) if packed else later)


@pytest.mark.parametrize(
    ("layout", "packed"), [("contiguous", True), ("zigzag", False), ("zigzag", True), ("striped", True)]
)
def test_a_token_reaches_exactly_those_that_may_see_it(layout, packed):
    q, k, v, dout = random_qkv(14, 1, LENGTH, 4, 2, 8)
    attend = _sharded(_ring_mesh(4), layout, DOCUMENTS if packed else None)

    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    before, *_ = run(q, k, v, dout)
    for token in (0, 7, 8, 12, 20, 25, 31):
        after, *_ = run(q, k.at[0, token].add(1.0), v.at[0, token].add(1.0), dout)
        changed = (np.asarray(after) != np.asarray(before)).any(axis=(0, 2, 3))
        np.testing.assert_array_equal(np.flatnonzero(changed), _seen_by(token, packed))

        # and backwards: only those in `chosen` enter the loss
        chosen = np.arange(LENGTH) == token
        _, dq, dk, dv = run(q, k, v, jnp.where(chosen[:, None, None], dout, 0))
        reached = [np.flatnonzero(np.asarray(x).any(axis=(0, 2, 3))) for x in (dq, dk, dv)]
        seen = [other for other in range(LENGTH) if token in _seen_by(other, packed)]
        np.testing.assert_array_equal(reached[2], seen)
        assert set(reached[1]) == (set(seen) if len(seen) > 1 else set(reached[1]) & {token})
        assert set(reached[0]) <= {token}


# --- Mutants: each is a mistake that a ring can make, and the comparison with the oracle must see it ------------------


def _wrong_way(patch):
    def rotate(self, tree):
        shift = [((i + 1) % self.size, i) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, shift), tree)

    patch.setattr(ring._Ring, "rotate", rotate)


def _wrong_source(patch):
    hop = ring._Ring.hop
    patch.setattr(ring._Ring, "hop", lambda self, step, *rest: hop(self, self.size - step, *rest))


def _positions_of_another_layout(patch):
    positions = ra.SequenceLayout.shard_positions
    other = lambda self, *args: positions(ra.SequenceLayout("contiguous", self.ring_size), *args)  # noqa: E731
    patch.setattr(ra.SequenceLayout, "shard_positions", other)


def _segments_stay_at_home(patch):
    rotate = ring._Ring.rotate

    def mutant(self, tree):
        return jax.tree.map(lambda old, new: old if old.dtype == jnp.int32 else new, tree, rotate(self, tree))

    patch.setattr(ring._Ring, "rotate", mutant)


def _hops_weigh_alike(patch):
    absorb = online_softmax.absorb

    def mutant(running, out, lse):
        return absorb(running, out, lse)._replace(weighted=running.weighted + out)

    patch.setattr(online_softmax, "absorb", mutant)


def _last_step_of_the_loop_missing(patch):
    scan = ring._Ring.scan
    patch.setattr(ring._Ring, "scan", lambda self, body, carry, steps: scan(self, body, carry, steps[:-1]))


def _with_backward(patch, backward):
    xla = kernels.KERNELS["xla"]
    patch.setitem(kernels.KERNELS, "xla", Kernel("mutant", xla.forward, functools.partial(backward, xla)))


def _lse_of_the_hop(patch):
    def backward(xla, q, k, v, whole, hop, *rest):
        out, lse = xla.forward(q, k, v, hop, *rest)
        return xla.backward(q, k, v, Whole.of(out.astype(q.dtype), lse, whole.dout), hop, *rest)

    _with_backward(patch, backward)


def _stale_keys_in_the_backward_pass(patch):
    first = []

    def backward(xla, q, k, v, *rest):
        first.append((k, v))
        return xla.backward(q, *first[0], *rest)

    _with_backward(patch, backward)


def _no_gradient(patch):
    _with_backward(patch, lambda xla, q, k, v, *_: [jnp.zeros_like(x, jnp.float32) for x in (q, k, v)])


def _grouped_heads_of_the_first_query_only(patch):
    def backward(xla, q, k, v, whole, *rest):
        first = jnp.arange(q.shape[2]) % (q.shape[2] // k.shape[2]) == 0
        whole = whole._replace(dout=whole.dout * first[:, None], delta=whole.delta * first)
        return xla.backward(q, k, v, whole, *rest)

    _with_backward(patch, backward)


def _on_gradients(keep):
    """A mutant whose rings leave the `keep`-th passing on of dK and dV alone out."""

    def mutate(patch):
        rotate, seen = ring._Ring.rotate, []

        def mutant(self, tree):
            alone = len(tree) == 2 and not isinstance(tree[0], tuple)
            seen.extend([tree] * alone)
            return tree if alone and len(seen) == keep else rotate(self, tree)

        patch.setattr(ring._Ring, "rotate", mutant)

    return mutate


MUTANTS = {
    "rotates the wrong way": (_wrong_way, NAMES),
    "takes the visitor for another shard": (_wrong_source, NAMES),
    "positions of another layout": (_positions_of_another_layout, NAMES),
    "segments do not travel": (_segments_stay_at_home, NAMES),
    "hops weigh alike": (_hops_weigh_alike, ("out", "dq", "dk")),
    "a hop is missing": (_last_step_of_the_loop_missing, NAMES),
    "backward with the hop's own lse": (_lse_of_the_hop, ("dq", "dk", "dv")),
    "stale keys and values in the backward pass": (_stale_keys_in_the_backward_pass, ("dq", "dk", "dv")),
    "no gradient": (_no_gradient, ("dq", "dk", "dv")),
    "one query head of each group": (_grouped_heads_of_the_first_query_only, ("dq", "dk", "dv")),
    "dK and dV stay behind in the last hop": (_on_gradients(1), ("dk", "dv")),
    "dK and dV are not sent home": (_on_gradients(2), ("dk", "dv")),
    "none": (lambda patch: None, ()),
}


@pytest.fixture(scope="module")
def packed():
    """Arrays and segments, the oracle's results, and the bounds that `assert_as_exact_as_dense` puts on errors."""
    qkv, mask = random_qkv(15, 1, 48, 4, 2, 8), dict(segment_ids=random_segments(16, 1, 48, count=2))
    return qkv, mask["segment_ids"], oracle(*qkv, **mask), 2 * np.array(dense_errors(*qkv, **mask))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_with_the_oracle_sees_what_a_ring_can_do_wrong(name, packed, monkeypatch):
    (mutate, wrong), (qkv, segments, want, bounds) = MUTANTS[name], packed
    mutate(monkeypatch)
    too_large = ~(errors(_simulate(3, *qkv, "zigzag", segments), want) <= bounds)
    assert set(np.array(NAMES)[too_large]) == set(wrong)


# --- Errors -----------------------------------------------------------------------------------------------------------

DEFAULT_SPEC = Spec(("dp", "fsdp"), "sp", "tp", None)
BAD_CALLS = {
    "length, contiguous": (
        dict(T=50),
        {},
        "seq_len=50 is not divisible by the ring size sp=4; pad to 52",
    ),
    "length, striped": (
        dict(T=50),
        dict(layout="striped"),
        "seq_len=50 is not divisible by the ring size sp=4; pad to 52",
    ),
    "length, zigzag, where striped would do": (
        dict(T=52),
        dict(layout="zigzag"),
        'seq_len=52 is not divisible by 2*sp (zigzag)=8; pad to 56 or use layout="striped"',
    ),
    "length, zigzag, where striped would not do": (
        dict(T=50),
        dict(layout="zigzag"),
        "seq_len=50 is not divisible by 2*sp (zigzag)=8; pad to 56",
    ),
    "query heads over tp": (
        dict(H=3, K=1),
        {},
        "heads of q=3 is not divisible by tp=2; use fewer devices on these axes",
    ),
    "key heads over tp": (
        dict(H=4, K=1),
        {},
        "heads of k=1 is not divisible by tp=2; use fewer devices on these axes",
    ),
    "axis name": (
        {},
        dict(axis_name="ring"),
        "axis_name='ring' is not an axis of the mesh, which has {'dp': 1, 'fsdp': 1, 'sp': 4, 'tp': 2}",
    ),
    "spec without the ring": (
        {},
        dict(spec=Spec("sp", None)),
        f"spec={Spec('sp', None)} must shard axis 1 (tokens) over 'sp' alone and leave axis 3 (head_dim) whole; "
        f"for example {DEFAULT_SPEC}",
    ),
    "spec that cuts heads apart": (
        {},
        dict(spec=Spec(None, "sp", None, "tp")),
        f"spec={Spec(None, 'sp', None, 'tp')} must shard axis 1 (tokens) over 'sp' alone and leave axis 3 "
        f"(head_dim) whole; for example {DEFAULT_SPEC}",
    ),
    "spec with an unknown axis": (
        {},
        dict(spec=Spec("rows", "sp")),
        f"spec={Spec('rows', 'sp')} names 'rows', but the mesh has {dict(dp=1, fsdp=1, sp=4, tp=2)}; drop it from spec",
    ),
    "layout of another ring": (
        {},
        dict(layout=ra.SequenceLayout("striped", 8)),
        "layout is for ring_size=8, but the mesh axis has 4 devices; use SequenceLayout('striped', 4)",
    ),
    "unknown layout": (
        {},
        dict(layout="spiral"),
        "layout='spiral' is not known; choose one of 'contiguous', 'striped', 'zigzag'",
    ),
    "unknown kernel": (
        {},
        dict(impl="magic"),
        "impl='magic' is not known; choose one of 'auto', ",
    ),
    "segments of another length": (
        {},
        dict(segment_ids=np.zeros((2, 24), np.int32)),
        "segment_ids has shape (2, 24), need [B=2, T=48]; reshape or transpose it before the call",
    ),
    "segments of one axis": (
        {},
        dict(segment_ids=np.zeros(48, np.int32)),
        "segment_ids has shape (48,), need [B=2, T=48]; reshape or transpose it before the call",
    ),
    "keys of another length": (
        dict(S=56),
        {},
        "k has shape (2, 56, 2, 8), need [B=2, T=48, K=any, D=8]; reshape or transpose it before the call",
    ),
    "heads that do not divide": (
        dict(H=4, K=3),
        {},
        "q has H=4 heads and k has K=3; K must divide H (grouped queries)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused_with_what_it_got_what_it_needs_and_a_remedy(case):
    sizes, arguments, message = BAD_CALLS[case]
    q, k, v, _ = random_qkv(0, **(dict(B=2, T=48, H=4, K=2, D=8) | sizes))
    whole = re.escape(message) + ("" if message.endswith(" ") else "$")
    with pytest.raises(ValueError, match=whole):
        ra.ring_attention(q, k, v, **(dict(mesh=ra.make_mesh(sp=4, tp=2)) | arguments))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    q, k, v, _ = random_qkv(0, B=3, T=48, H=4, K=2, D=8)
    message = "batch of q=3 is not divisible by dpxfsdp=4; use fewer devices on these axes"
    with pytest.raises(ValueError, match=re.escape(message)):
        ra.ring_attention(q, k, v, mesh=ra.make_mesh(dp=2, fsdp=2, sp=2))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (dict(k=(2, 6, 2, 8), v=(2, 6, 2, 8)), "k has shape (2, 6, 2, 8), need [B=2, t=5, K=any, D=8]; reshape or"),
        (dict(segment_ids=(2, 20)), "segment_ids has shape (2, 20), need [B=2, t=5]; reshape or transpose it"),
    ],
    ids=str,
)
def test_a_bad_call_on_slices_is_refused_too(shapes, message):
    shapes = dict(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8), segment_ids=(2, 5)) | shapes
    q, k, v, segment_ids = (jnp.zeros((4, *shape)) for shape in shapes.values())
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.vmap(lambda q, k, v, ids: ra.ring_attention_shard(q, k, v, segment_ids=ids.astype(int)), axis_name="sp")(
            q, k, v, segment_ids
        )
