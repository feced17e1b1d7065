"""Queries of one sequence and keys of another, sharded over the same devices, with lengths and layouts of their own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import Bound, quickly, results, ring_mesh

import ring_attention as ra
from ring_attention.parallel import context, ring, sides
from ring_attention.parallel.strategy import Hops
from ring_attention.testing import NAMES, random_qkv, random_segments, relative_error

B, T, S, H, K, D, D_V = 2, 48, 72, 8, 4, 6, 10
DOCUMENTS = dict(
    causal=False, segment_ids=random_segments(1, B, T, count=3), kv_segment_ids=random_segments(2, B, S, count=3)
)
LENGTHS = dict(causal=False, kv_lengths=np.array([41, 72]), window=(30, 50))
CAUSAL = dict(q_positions=np.arange(T) + 24, alibi_slopes=np.linspace(0.1, 0.8, H, dtype=np.float32))

CASES = {  # strategy, devices, layouts of queries and of keys, dtype, keys, mask
    "ring": ("ring", 3, "zigzag", "striped", "float32", S, DOCUMENTS),
    "ring, lengths": ("ring", 8, "striped", "zigzag", "bfloat16", 80, LENGTHS | dict(kv_lengths=np.array([41, 80]))),
    "ring, causal": ("ring", 2, "contiguous", "contiguous", "float32", S, CAUSAL),
    "ring, padded": ("ring", 2, "zigzag", None, "float32", 71, dict(causal=False)),
    "both ways": ("ring", 2, "zigzag", "contiguous", "float32", S, DOCUMENTS),
    "all_gather": ("all_gather", 3, "striped", "zigzag", "float32", S, LENGTHS),
    "ulysses": ("ulysses", 4, "zigzag", None, "bfloat16", S, DOCUMENTS),
    "usp": ("usp", 4, "zigzag", "striped", "float32", S, DOCUMENTS),
    "ring_self_attention": ("ring_self_attention", 2, "zigzag", "contiguous", "float32", S, DOCUMENTS),
    "single_device": ("single_device", 1, "contiguous", None, "float32", S, LENGTHS),
}


def _attention(name, P, kind, kv_kind, mask, **options):
    """`context_attention` of arrays in natural order."""
    layout = ra.SequenceLayout(kind, P)
    keys = layout if kv_kind is None else ra.SequenceLayout(kv_kind, P)
    options |= dict(ulysses_size=2) if name == "usp" else {}
    given = {("positions" if x == "q_positions" else x): y for x, y in mask.items()}
    for x, order in (("segment_ids", layout), ("kv_segment_ids", keys)):
        given |= {x: order.permute(given[x], 1)} if x in given else {}

    def deal(order, x):
        whole = order.positions(order.padded_length(x.shape[1]))
        return x[:, whole[whole < x.shape[1]]]

    def attend(q, k, v):
        arrays = deal(layout, q), deal(keys, k), deal(keys, v)
        settings = dict(mesh=ring_mesh(P), layout=layout, kv_layout=kv_kind and keys, strategy=name, impl="plain")
        return layout.unpermute(ra.context_attention(*arrays, **settings, **given, **options), 1)

    return attend


@functools.cache
def _bound(case):
    _, _, _, _, dtype, length, mask = CASES[case]
    qkv = random_qkv(0, B, T, H, K, D, dtype=dtype, S=length, D_v=D_V)
    return qkv, Bound(qkv, **mask)


@pytest.mark.parametrize("case", CASES)
def test_cross_attention_over_a_mesh_is_as_exact_as_dense(case):
    name, P, kind, kv_kind, _, _, mask = CASES[case]
    options = dict(duplex=True) if case == "both ways" else {}
    qkv, bound = _bound(case)
    got = results(_attention(name, P, kind, kv_kind, mask, **options), qkv)
    assert [x.shape for x in got] == [qkv[3].shape, *(x.shape for x in qkv[:3])]
    assert bound.too_large(got) == {}


MUTANTS = {
    "keys at the places of queries": ("ring, causal", {*NAMES}),
    "padding is seen": ("ring, padded", {*NAMES}),
    "a hop too few": ("ring", {*NAMES}),
}


@pytest.mark.parametrize("wrong", MUTANTS)
def test_mistakes_of_cross_attention_exceed_the_bound(wrong, monkeypatch):
    case, want = MUTANTS[wrong]
    name, P, kind, kv_kind, _, _, mask = CASES[case]
    right = sides.Sides.placed
    if wrong == "keys at the places of queries":

        def placed(self, named, batch, tokens, keys):
            named = right(self, named, batch, tokens, keys)
            return named | dict(kv_positions=named["kv_positions"] + 24)

        monkeypatch.setattr(sides.Sides, "placed", placed)
    elif wrong == "padding is seen":
        monkeypatch.setattr(sides.Sides, "placed", lambda *args: right(*args) | dict(kv_valid=None))
    else:
        count = ring.count_hops
        monkeypatch.setattr(ring, "count_hops", lambda *args: Hops(count(*args).forth - 1, count(*args).back))
    context._sharded.cache_clear()
    qkv, bound = _bound(case)
    try:
        assert set(bound.too_large(results(_attention(name, P, kind, kv_kind, mask), qkv))) == want
    finally:
        context._sharded.cache_clear()


def test_cross_attention_inside_a_shard_map_gives_the_lse_too():
    q, k, v, _ = random_qkv(3, 1, 24, 2, 1, 8, S=36)
    lengths = jnp.array([29])
    want = ra.reference_attention(q, k, v, causal=False, kv_lengths=lengths, return_lse=True)
    settings = dict(layout="striped", kv_layout="contiguous", causal=False, return_lse=True, impl="plain")

    def on_shard(q, k, v):
        return ra.context_attention_shard(q, k, v, kv_lengths=lengths, **settings)

    layout, spec = ra.SequenceLayout("striped", 3), jax.P(None, "sp")
    run = quickly(jax.shard_map(on_shard, mesh=ring_mesh(3), in_specs=spec, out_specs=(spec, spec)))
    got = [layout.unpermute(x, 1) for x in run(layout.permute(q, 1), k, v)]
    assert [relative_error(x, y) < 1e-6 for x, y in zip(got, want, strict=True)] == [True, True]


def test_documents_that_meet_at_home_send_no_keys(monkeypatch):
    found = []
    count = ring.count_hops

    def counted(*args):
        found.append(count(*args))
        return found[-1]

    monkeypatch.setattr(ring, "count_hops", counted)
    q, k, v, _ = random_qkv(4, 1, 16, 2, 1, 8, S=32)
    own, theirs = (np.repeat([[0, 1, 2, 3]], number, 1) for number in (4, 8))

    def on_shard(q, k, v, own, theirs):
        ra.context_attention_shard(q, k, v, segment_ids=own, kv_segment_ids=theirs, causal=False, impl="plain")
        return jnp.stack(found.pop())[None]

    spec = jax.P(None, "sp")
    run = quickly(jax.shard_map(on_shard, mesh=ring_mesh(4), in_specs=spec, out_specs=jax.P("sp")))
    assert np.asarray(run(q, k, v, own, theirs)).tolist() == [[0, 0]] * 4
    assert np.asarray(run(q, k, v, own, np.roll(theirs, 8, 1))).max() == 1  # the control: a shard farther on


BAD_CALLS = {
    "segments of queries alone": (dict(segment_ids=np.zeros((1, 16), int)), "give kv_segment_ids"),
    "segments of keys alone": (dict(kv_segment_ids=np.zeros((1, 24), int)), "kv_segment_ids needs segment_ids"),
    "order of the queries": (
        dict(segment_ids=np.zeros((1, 16), int), kv_layout="striped", S=16),
        "segment_ids are in the order of the queries, and keys have their own; give kv_segment_ids",
    ),
    "positions of keys": (dict(kv_positions=np.arange(16)), "kv_positions has shape (16,), need [T=24]"),
    "two places": (
        dict(kv_positions=np.arange(24), kv_layout="zigzag"),
        "kv_positions are given beside layout='zigzag'",
    ),
    "bounded segments": (
        dict(segment_ids=np.zeros((1, 16), int), kv_segment_ids=np.zeros((1, 24), int), max_segment_len=4),
        "max_segment_len bounds segments of one sequence, and keys are of another",
    ),
    "another ring": (dict(kv_layout=ra.SequenceLayout("zigzag", 4)), "layout is for ring_size=4"),
    "sparse": (dict(strategy="sparse", stride=2), 'strategy="sparse" cuts shards into runs of consecutive tokens'),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_cross_attention_refuses_a_bad_call_in_words(case):
    arguments, message = BAD_CALLS[case]
    arguments = dict(arguments)
    q, k, v, _ = random_qkv(0, 1, 16, 2, 1, 8, S=arguments.pop("S", 24))
    with pytest.raises(ValueError, match=re.escape(message)):
        ra.context_attention(q, k, v, mesh=ring_mesh(2), impl="plain", **arguments)
