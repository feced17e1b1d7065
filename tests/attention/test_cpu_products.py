"""What XLA's CPU compiler makes of the products of attention: it knows fast code only for some ways of writing one."""

import re

import jax
import jax.numpy as jnp
import pytest

import ring_attention as ra


def _contracted(fn, *arrays):
    """The axis that each product of the compiled program sums over in its first factor."""
    text = jax.jit(fn).lower(*arrays).compile().as_text()
    return {dims for dims in re.findall(r" dot\(.*?lhs_contracting_dims=\{([\d,]*)\}", text)}


@pytest.mark.parametrize("heads", [2, 4])
def test_backward_products_need_no_transposed_first_factor(heads):
    q, k = jnp.ones((1, 96, heads, 16)), jnp.ones((1, 96, 2, 16))
    blocks = ra.BlockSizes(q=32, kv=16)

    def gradients(q, k, v, dout):
        return jax.vjp(lambda *x: ra.blockwise_attention(*x, block_sizes=blocks), q, k, v)[1](dout)

    assert _contracted(gradients, q, k, k, q) == {"1"}


def test_transposed_first_factor_is_seen():
    x = jnp.ones((64, 32))
    assert _contracted(lambda x, y: x.T @ y, x, x) == {"0"}
