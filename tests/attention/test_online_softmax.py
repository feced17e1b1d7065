import jax.numpy as jnp
import numpy as np

from ring_attention.attention import online_softmax
from ring_attention.attention.online_softmax import Running

NOTHING = (jnp.zeros((1, 3)), jnp.full((1,), -jnp.inf))
SOMETHING = (jnp.array([[1.0, -2.0, 3.0]]), jnp.array([0.5]))


def test_merging_two_empty_rows_gives_an_empty_row_and_no_nan():
    out, lse = online_softmax.merge(NOTHING, NOTHING)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_merging_with_an_empty_row_changes_nothing():
    for pair in ((NOTHING, SOMETHING), (SOMETHING, NOTHING)):
        out, lse = online_softmax.merge(*pair)
        np.testing.assert_array_equal(out, SOMETHING[0])
        np.testing.assert_allclose(lse, SOMETHING[1])


def test_scores_far_beyond_the_range_of_exp_do_not_overflow():
    scores, values = jnp.array([[9e3, -9e3, 9e3]]), jnp.eye(3)
    running = online_softmax.update(Running.empty((1, 3)), scores[:, :2], values[:2])
    out, lse = online_softmax.finish(online_softmax.update(running, scores[:, 2:], values[2:]))
    np.testing.assert_allclose(out, [[0.5, 0, 0.5]])
    np.testing.assert_allclose(lse, [9e3 * np.log(2) + np.log(2)], rtol=1e-6)


def test_order_of_arrival_does_not_matter():
    rng = np.random.default_rng(0)
    parts = [(jnp.asarray(rng.standard_normal((4, 2))), jnp.asarray(rng.standard_normal(4) * 50)) for _ in range(2)]
    forth, back = online_softmax.merge(*parts), online_softmax.merge(*reversed(parts))
    np.testing.assert_allclose(forth[0], back[0], rtol=1e-6)
    np.testing.assert_allclose(forth[1], back[1], rtol=1e-6)
