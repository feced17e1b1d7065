import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_attention as ra
from ring_attention.parallel.layouts import LAYOUT_KINDS, as_layout

LAYOUTS = st.builds(ra.SequenceLayout, st.sampled_from(LAYOUT_KINDS), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, length=st.integers(1, 120), axis=st.integers(-3, 2), as_numpy=st.booleans())
def test_unpermute_undoes_permute_of_any_array(layout, length, axis, as_numpy):
    shape = [2, 3, 5]
    shape[axis] = length
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    dealt = layout.permute(x if as_numpy else jnp.asarray(x), axis)
    assert isinstance(dealt, np.ndarray) == as_numpy
    np.testing.assert_array_equal(dealt, x.take(layout.positions(length), axis))
    np.testing.assert_array_equal(layout.unpermute(dealt, axis), x)


def _one_by_one(layout, shard_len):
    """Positions of the shards one after the other, as each device works them out for itself."""
    shards = [layout.shard_positions(shard, shard_len) for shard in range(layout.ring_size)]
    assert all(shard.dtype == jnp.int32 for shard in shards)
    return np.concatenate(shards)


@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS, chunks=st.sampled_from([1, 3, 20]))
def test_positions_are_those_of_the_shards_in_order(layout, chunks):
    t = 2 * chunks
    positions = layout.positions(t * layout.ring_size)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(np.sort(positions), np.arange(t * layout.ring_size))
    np.testing.assert_array_equal(positions, _one_by_one(layout, t))
    traced = jax.vmap(lambda shard: layout.shard_positions(shard, t))(jnp.arange(layout.ring_size))
    assert traced.dtype == jnp.int32
    np.testing.assert_array_equal(positions, traced.reshape(-1))


@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS, length=st.integers(1, 120))
def test_positions_of_any_length_leave_out_the_padding(layout, length):
    padded = _one_by_one(layout, layout.padded_length(length) // layout.ring_size)
    positions = layout.positions(length)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(np.sort(positions), np.arange(length))
    np.testing.assert_array_equal(positions, [position for position in padded if position < length])


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, length=st.integers(1, 120))
def test_padded_length_is_the_least_for_equal_shards(layout, length):
    pieces = 2 * layout.ring_size if layout.kind == "zigzag" else layout.ring_size
    padded = layout.padded_length(length)
    assert padded == next(n for n in range(length, length + pieces) if n % pieces == 0)
    layout.check_length(padded)
    if padded != length:
        with pytest.raises(ValueError, match=f"seq_len={length} is not divisible by .*; pad to {padded}"):
            layout.check_length(length)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(["contiguous", "zigzag"]), P=st.integers(1, 9), chunks=st.integers(1, 20))
def test_chunk_starts_are_where_runs_begin(kind, P, chunks):
    layout, t = ra.SequenceLayout(kind, P), 2 * chunks
    for shard, positions in enumerate(layout.positions(P * t).reshape(P, t)):
        starts = layout.chunk_starts(shard, t)
        assert len(starts) == (1 if kind == "contiguous" else 2)
        np.testing.assert_array_equal(positions.reshape(len(starts), -1)[:, 0], starts)
        np.testing.assert_array_equal(np.diff(positions.reshape(len(starts), -1)), 1)


def test_layouts_deal_as_their_names_say():
    def dealt(length):
        return {kind: ra.SequenceLayout(kind, 2).positions(length).tolist() for kind in LAYOUT_KINDS}

    assert dealt(8) == {
        "contiguous": [0, 1, 2, 3, 4, 5, 6, 7],
        "zigzag": [0, 1, 6, 7, 2, 3, 4, 5],
        "striped": [0, 2, 4, 6, 1, 3, 5, 7],
    }
    assert dealt(7) == {
        "contiguous": [0, 1, 2, 3, 4, 5, 6],
        "zigzag": [0, 1, 6, 2, 3, 4, 5],
        "striped": [0, 2, 4, 6, 1, 3, 5],
    }


def test_zigzag_and_striped_share_causal_work_evenly():
    def imbalance(kind):
        visible = ra.SequenceLayout(kind, 8).positions(4096).reshape(8, -1).astype(np.int64) + 1
        return visible.sum(1).max() / visible.sum(1).mean()

    assert imbalance("zigzag") == 1
    assert imbalance("striped") <= 1.01
    assert imbalance("contiguous") > 1.8


LENGTHS = {
    ("contiguous", 50): "seq_len=50 is not divisible by the ring size sp=4; pad to 52",
    ("striped", 50): "seq_len=50 is not divisible by the ring size sp=4; pad to 52",
    # where striped would do as it is, and where it would not
    ("zigzag", 52): 'seq_len=52 is not divisible by 2*sp (zigzag)=8; pad to 56 or use layout="striped"',
    ("zigzag", 50): "seq_len=50 is not divisible by 2*sp (zigzag)=8; pad to 56",
}


@pytest.mark.parametrize(("kind", "length"), LENGTHS)
def test_check_length_refuses_with_a_remedy(kind, length):
    with pytest.raises(ValueError, match=re.escape(LENGTHS[kind, length]) + "$"):
        ra.SequenceLayout(kind, 4).check_length(length)


def test_layout_refuses_no_devices_and_unknown_kinds():
    with pytest.raises(ValueError, match="ring_size=0 must be positive"):
        ra.SequenceLayout("striped", 0)
    with pytest.raises(
        ValueError, match="layout='spiral' is not known; choose one of 'contiguous', 'striped', 'zigzag'"
    ):
        ra.SequenceLayout("spiral", 2)


def test_layout_drawing_is_how_tokens_are_dealt():
    lines = inspect.getdoc(ra.SequenceLayout).splitlines()
    first = next(number for number, line in enumerate(lines) if "contiguous    zigzag" in line)
    names = re.split(r" {3,}", lines[first].strip())
    chunks = ((0, 1), (2, 3))
    shown = {
        "contiguous": ra.SequenceLayout("contiguous", 2),
        "zigzag": ra.SequenceLayout("zigzag", 2),
        "striped": ra.SequenceLayout("striped", 2),
        "striped, stripe=2": ra.SequenceLayout("striped", 2, stripe=2),
        f"dealt, chunks={chunks}": ra.SequenceLayout("dealt", 2, chunks=chunks),
    }
    assert names == list(shown)
    rows = [[int(number) for number in line.split()] for line in lines[first + 1 : first + 3]]
    for row, shard in zip(rows, range(2), strict=True):
        dealt = [layout.shard_positions(shard, 4) for layout in shown.values()]
        np.testing.assert_array_equal(np.reshape(row, (-1, 4)), dealt)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", ra.SequenceLayout.for_speeds([1, 1, 2, 1])], ids=str)
def test_in_order_sorts_all_shards_by_position_and_back(layout):
    layout = as_layout(layout, 4)
    length = layout.padded_length(64)
    gathered = np.asarray(layout.all_positions(length // 4)).reshape(1, -1, 1)
    found = layout.in_order(gathered, 1)
    assert found[0, :, 0].tolist() == list(range(length))
    assert (layout.in_order(found, 1, back=True) == gathered).all()
    assert layout.all_runs(length // 4).positions().tolist() == list(range(length))


def test_in_order_leaves_stripes_spaced():
    layout = ra.SequenceLayout("striped", 4)
    gathered = np.asarray(layout.all_positions(4)).reshape(-1)
    assert (layout.in_order(gathered, 0) == gathered).all()
    assert (layout.all_runs(4).positions() == gathered).all()
