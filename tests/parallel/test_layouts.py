import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_attention as ra
from ring_attention.parallel.layouts import LAYOUT_KINDS

LAYOUTS = st.builds(ra.SequenceLayout, st.sampled_from(LAYOUT_KINDS), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, chunks=st.integers(1, 6), axis=st.integers(-3, 2), as_numpy=st.booleans())
def test_unpermute_undoes_permute_on_any_axis_of_numpy_and_jax_arrays(layout, chunks, axis, as_numpy):
    shape = [2, 3, 5]
    shape[axis] = 2 * layout.ring_size * chunks
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    given_x = x if as_numpy else jnp.asarray(x)
    dealt = layout.permute(given_x, axis)
    assert isinstance(dealt, np.ndarray) == as_numpy
    np.testing.assert_array_equal(dealt, x.take(layout.positions(shape[axis]), axis))
    np.testing.assert_array_equal(layout.unpermute(dealt, axis), x)


@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS, chunks=st.sampled_from([1, 3, 20]))
def test_positions_are_those_of_the_shards_one_after_the_other(layout, chunks):
    t = 2 * chunks
    positions = layout.positions(t * layout.ring_size)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(np.sort(positions), np.arange(t * layout.ring_size))
    one_by_one = [layout.shard_positions(shard, t) for shard in range(layout.ring_size)]
    np.testing.assert_array_equal(positions, np.concatenate(one_by_one))
    traced = jax.vmap(lambda shard: layout.shard_positions(shard, t))(jnp.arange(layout.ring_size))
    assert traced.dtype == jnp.int32
    np.testing.assert_array_equal(positions, traced.reshape(-1))


def test_odd_shards_can_be_dealt_except_in_zigzag():
    for kind in ("contiguous", "striped"):
        layout = ra.SequenceLayout(kind, 3)
        np.testing.assert_array_equal(
            np.concatenate([layout.shard_positions(shard, 5) for shard in range(3)]), layout.positions(15)
        )
    with pytest.raises(ValueError, match='seq_len=15 is not divisible by .*; pad to 18 or use layout="striped"$'):
        ra.SequenceLayout("zigzag", 3).positions(15)


def test_layouts_deal_as_their_names_say():
    dealt = {kind: ra.SequenceLayout(kind, 2).positions(8).reshape(2, 4).tolist() for kind in LAYOUT_KINDS}
    assert dealt == {
        "contiguous": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "zigzag": [[0, 1, 6, 7], [2, 3, 4, 5]],
        "striped": [[0, 2, 4, 6], [1, 3, 5, 7]],
    }


def test_zigzag_and_striped_share_causal_work_evenly_and_contiguous_does_not():
    def imbalance(kind):
        visible = ra.SequenceLayout(kind, 8).positions(4096).reshape(8, -1).astype(np.int64) + 1
        return visible.sum(1).max() / visible.sum(1).mean()

    assert imbalance("zigzag") == 1
    assert imbalance("striped") <= 1.01
    assert imbalance("contiguous") > 1.8


def test_a_ring_of_no_devices_and_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="ring_size=0 must be positive"):
        ra.SequenceLayout("striped", 0)
    with pytest.raises(
        ValueError, match="layout='spiral' is not known; choose one of 'contiguous', 'striped', 'zigzag'"
    ):
        ra.SequenceLayout("spiral", 2)
