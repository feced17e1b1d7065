import jax.numpy as jnp
import numpy as np
import pytest

from ring_attention.attention import online_softmax
from ring_attention.attention.online_softmax import SoftmaxState

EMPTY_ROW = (jnp.zeros((1, 3)), jnp.full((1,), -jnp.inf))
ROW = (jnp.array([[1.0, -2.0, 3.0]]), jnp.array([0.5]))


def joined(*parts):
    """(out, lse) after absorbing parts that each have an out and an lse."""
    state = SoftmaxState.empty(parts[0][0].shape)
    for part in parts:
        state = online_softmax.merge(state, *part)
    return online_softmax.finalize(state)


def test_merge_of_two_empty_rows_is_empty_and_no_nan():
    out, lse = joined(EMPTY_ROW, EMPTY_ROW)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("parts", [(ROW,), (EMPTY_ROW, ROW), (ROW, EMPTY_ROW)])
def test_merge_of_an_empty_row_changes_nothing(parts):
    out, lse = joined(*parts)
    np.testing.assert_array_equal(out, ROW[0])
    np.testing.assert_array_equal(lse, ROW[1])


def test_update_does_not_overflow_beyond_the_range_of_exp():
    scores, values = jnp.array([[9e3, -9e3, 9e3]]), jnp.eye(3)
    state = online_softmax.update(SoftmaxState.empty((1, 3)), scores[:, :2], values[:2])
    out, lse = online_softmax.finalize(online_softmax.update(state, scores[:, 2:], values[2:]))
    np.testing.assert_allclose(out, [[0.5, 0, 0.5]])
    np.testing.assert_allclose(lse, [9e3 + np.log(2)], rtol=1e-6)


def test_merge_does_not_depend_on_order():
    rng = np.random.default_rng(0)
    parts = [(jnp.asarray(rng.standard_normal((4, 2))), jnp.asarray(rng.standard_normal(4) * 50)) for _ in range(3)]
    for got, want in zip(joined(*parts), joined(*reversed(parts)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_merge_error_of_the_lse_does_not_grow_with_hops():
    rng = np.random.default_rng(1)
    lse = (rng.standard_normal((256, 2000)) + 100).astype(np.float32)
    part = jnp.zeros((2000, 1))
    want = np.log(np.exp(lse.astype(np.float64) - 100).sum(0)) + 100
    together = joined(*((part, jnp.asarray(row)) for row in lse))[1]

    rounded = joined((part, jnp.asarray(lse[0])))  # the control rounds the lse after every hop
    for row in lse[1:]:
        rounded = joined(rounded, (part, jnp.asarray(row)))
    spread = lambda got: np.abs(np.asarray(got, np.float64) - want).mean()  # noqa: E731
    assert spread(together) < 5e-6
    assert spread(rounded[1]) > 4 * spread(together)
