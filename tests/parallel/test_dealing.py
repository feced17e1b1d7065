"""Rows of packed documents are dealt evenly, near, and each chunk once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_attention as ra
from ring_attention.parallel.dealing import BALANCE, deal_documents

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=12)


def ids_of(lengths) -> np.ndarray:
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def visible(ids: np.ndarray) -> np.ndarray:
    """Bool [T, T], by the definition."""
    positions = np.arange(len(ids))
    return (ids[:, None] == ids) & (positions[:, None] >= positions)


def filled(lengths, multiple: int) -> list[int]:
    """The lengths and one more document, so that their sum is divisible."""
    rest = -sum(lengths) % multiple
    return [*lengths, rest] if rest else list(lengths)


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, P=st.integers(1, 5), n=st.integers(1, 4), speeds=st.booleans())
def test_tables_hold_each_chunk_once_and_say_what_is_seen_and_sent(lengths, P, n, speeds):
    lengths = filled(lengths, P * n)
    speeds = [1.0 + i for i in range(P)] if speeds else None
    layout = ra.SequenceLayout.for_documents(ids_of(lengths)[None], P, chunks_per_shard=n, speeds=speeds)
    T = sum(lengths)
    layout.check(1, T)
    table = deal_documents(lengths, P, n, speeds)
    assert table.dtype == np.int32
    assert (np.diff(table, axis=1) > 0).all()
    np.testing.assert_array_equal(layout.table, table[None])
    ids = ids_of(lengths)
    positions = layout.positions(T)
    seen = visible(ids)[positions[0]]
    pairs = layout.visible_pairs(ids[None])
    np.testing.assert_array_equal(pairs[0], seen.reshape(P, -1).sum(1))
    np.testing.assert_array_equal(positions, np.concatenate([layout.shard_positions(i, T // P) for i in range(P)], 1))
    needed = seen[:, positions[0]].reshape(P, T // P, P, T // P).any((1, 3))  # [device of queries, device of keys]
    forth, back = layout.hops(ids[None])[0]
    shifts = {int(i - j) % P for i, j in np.argwhere(needed)} - {0}
    assert all(shift <= forth or P - shift <= back for shift in shifts)
    fewest = min(f + b for f in range(P) for b in range(P) if all(s <= f or P - s <= b for s in shifts))
    assert forth + back == fewest


@pytest.mark.parametrize("as_numpy", [True, False], ids=["numpy", "jax"])
def test_unpermute_undoes_permute_row_by_row(as_numpy):
    g = np.random.default_rng(0)
    table = np.stack([g.permutation(12).reshape(3, 4) for _ in range(2)]).astype(np.int32)
    layout = ra.DealtRows(table if as_numpy else jnp.asarray(table))
    x = g.integers(0, 99, (2, 5, 36, 3), dtype=np.int32)
    dealt = layout.permute(x if as_numpy else jnp.asarray(x), axis=2)
    assert isinstance(dealt, np.ndarray) == as_numpy
    assert isinstance(layout.positions(36), np.ndarray) == as_numpy
    for b in range(2):
        np.testing.assert_array_equal(dealt[b], x[b][:, np.asarray(layout.positions(36))[b]])
    np.testing.assert_array_equal(layout.unpermute(dealt, axis=2), x)


def test_tables_are_data_of_one_program():
    """The shard's number and the table may be traced; a table of other documents needs no other program."""
    traces = []

    @jax.jit
    def positions(layout, shard):
        traces.append(shard)
        return layout.shard_positions(shard, 8)

    for seed in range(2):
        table = np.random.default_rng(seed).permutation(8).reshape(1, 4, 2).astype(np.int32)
        layout = ra.DealtRows(table)
        got = [positions(layout, shard) for shard in range(4)]
        np.testing.assert_array_equal(np.concatenate(got, 1), layout.positions(32))
    assert len(traces) == 1


CASES = {
    "equal": [1024] * 16,
    "random": np.diff([0, *np.sort(np.random.default_rng(0).choice(16383, 15, replace=False) + 1), 16384]).tolist(),
    "one long": [9000, *[284] * 26],
    "whole row": [16384],
}


@pytest.mark.parametrize("name", CASES)
def test_work_is_even_where_documents_are_not(name):
    ids = ids_of(CASES[name])[None]
    layout = ra.SequenceLayout.for_documents(ids, 8, chunks_per_shard=16)
    pairs = layout.visible_pairs(ids)
    assert pairs.max() <= BALANCE * pairs.mean()
    contiguous = ra.DealtRows(np.arange(128, dtype=np.int32).reshape(1, 8, 16))
    if name != "equal":
        assert contiguous.visible_pairs(ids).max() > 1.3 * pairs.mean()


def test_documents_that_fit_on_a_device_stay_on_one():
    ids = ids_of(CASES["equal"])[None]
    layout = ra.SequenceLayout.for_documents(ids, 8)
    np.testing.assert_array_equal(layout.hops(ids), [[0, 0]])


def test_work_follows_speeds():
    speeds = [1.0, 0.5, 1.0, 2.0]
    ids = ids_of(CASES["random"])[None]
    layout = ra.SequenceLayout.for_documents(ids, 4, chunks_per_shard=16, speeds=speeds)
    pairs = layout.visible_pairs(ids)[0]
    share = pairs.sum() * np.array(speeds) / sum(speeds)
    assert (pairs / share).max() <= BALANCE
    equal = ra.SequenceLayout.for_documents(ids, 4, chunks_per_shard=16).visible_pairs(ids)[0]
    assert (equal / share).max() > 1.5


def test_segment_ids_that_come_again_are_one_segment():
    ids = np.array([[0, 1, 0, 1, 0, 0, 2, 1]])
    layout = ra.DealtRows(np.array([[[1, 0], [3, 2]]], np.int32))
    positions = layout.positions(8)[0]
    expected = visible(ids[0])[positions].reshape(2, -1).sum(1)
    np.testing.assert_array_equal(layout.visible_pairs(ids)[0], expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: deal_documents([10], 4, 1), "sum of lengths=10 is not divisible by ring_size . chunks_per_shard=4"),
        (lambda: deal_documents([8, 0], 4, 1), "lengths=.* must be positive and whole"),
        (lambda: deal_documents([8], 0, 1), "ring_size=0 must be positive"),
        (lambda: deal_documents([8], 2, 1, [1.0]), "speeds are 1, need ring_size=2"),
        (lambda: deal_documents([8], 2, 1, [1.0, -1.0]), "speeds=.* must be positive numbers"),
        (lambda: ra.SequenceLayout.for_documents(np.zeros(8), 2), "segment_ids has shape .8,., need"),
        (lambda: ra.SequenceLayout.for_documents(np.zeros((1, 9), int), 2), "seq_len=9 is not divisible by the"),
        (lambda: ra.DealtRows(np.zeros((1, 2, 2), np.int32)).check(1, 8), "each of 4 chunks once"),
        (lambda: ra.DealtRows(np.arange(4).reshape(1, 2, 2)).check(2, 8), "table has shape .1, 2, 2., need .B=2"),
        (lambda: ra.DealtRows(np.arange(4).reshape(1, 2, 2)).check(1, 9), "seq_len=9 is not divisible.*pad to 12"),
        (
            lambda: ra.DealtRows(np.arange(4).reshape(1, 2, 2)).permute(np.zeros((1, 9))),
            "x has shape .1, 9.* need 1 row",
        ),
        (lambda: ra.DealtRows(np.arange(4).reshape(1, 2, 2)).permute(np.zeros((1, 8)), axis=0), "axis=0 is the batch"),
    ],
)
def test_what_cannot_be_dealt_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
