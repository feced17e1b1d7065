import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_attention as ra
from ring_attention.planning.hlo import compiled


def _problem(T=26, M=6, F=64):
    rng = np.random.default_rng(0)
    up, down = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((M, F), (F, M)))
    x = jnp.asarray(rng.standard_normal((2, T, M)), jnp.float32)
    return lambda x: jax.nn.silu(x @ up) @ down, x


@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 25, 26, 100])
def test_blockwise_feedforward_matches_the_whole_with_any_chunk(chunk_size, keep_products):
    fn, x = _problem()
    loss = lambda f: lambda x: jnp.sin(f(x)).sum()  # noqa: E731
    chunked = lambda x: ra.blockwise_feedforward(fn, x, chunk_size=chunk_size, keep_products=keep_products)  # noqa: E731
    np.testing.assert_allclose(chunked(x), fn(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.grad(loss(chunked))(x), jax.grad(loss(fn))(x), rtol=1e-4, atol=1e-4)


def test_blockwise_feedforward_holds_one_chunk_of_activations():
    fn, x = _problem(T=256)
    gradient = jax.jit(jax.grad(lambda x: ra.blockwise_feedforward(fn, x, chunk_size=16).sum()))
    widest = lambda f: max(a.size for a in compiled.arrays(f.lower(x).compile().as_text()))  # noqa: E731
    assert widest(gradient) <= 2 * 256 * 6
    assert widest(jax.jit(jax.grad(lambda x: fn(x).sum()))) >= 2 * 256 * 64  # the control holds all of them


def test_blockwise_feedforward_keeps_products_when_asked():
    fn, x = _problem(T=256)

    def products(keep_products):
        chunked = lambda x: ra.blockwise_feedforward(fn, x, chunk_size=16, keep_products=keep_products)  # noqa: E731
        text = jax.jit(jax.grad(lambda x: jnp.sin(chunked(x)).sum())).lower(x).compile().as_text()
        return len(re.findall(r" = \S+ dot\(", text))

    assert products(keep_products=True) == 4  # up and down, once in each direction
    assert products(keep_products=False) == 5  # up again


def test_blockwise_feedforward_refuses_a_chunk_size_of_zero():
    fn, x = _problem()
    with pytest.raises(ValueError, match="chunk_size=0 must be positive and whole; use 26"):
        ra.blockwise_feedforward(fn, x, chunk_size=0)
