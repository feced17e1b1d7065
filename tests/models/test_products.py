"""Products with weights: what einsum gives, in a form whose gradients XLA's CPU compiler has fast code for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_attention.models.products import einsum_of_rows
from ring_attention.testing import relative_error

CASES = {
    "btm,mhd->bthd": ((2, 5, 6), (6, 3, 4)),
    "bthd,hdm->btm": ((2, 5, 3, 4), (3, 4, 6)),
    "bcm,mv->bcv": ((2, 5, 6), (6, 7)),
    "gbthd,ghdm->btm": ((2, 3, 5, 3, 4), (2, 3, 4, 6)),
}


def _arrays(equation):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in CASES[equation]]


@pytest.mark.parametrize("equation", CASES)
def test_rows_give_what_einsum_gives_and_its_gradients(equation):
    x, weight = _arrays(equation)
    value = lambda fn: lambda x, weight: jnp.sin(fn(equation, x, weight)).sum()  # noqa: E731
    assert relative_error(einsum_of_rows(equation, x, weight), jnp.einsum(equation, x, weight)) < 1e-6
    got, want = (jax.grad(value(fn), (0, 1))(x, weight) for fn in (einsum_of_rows, jnp.einsum))
    assert max(map(relative_error, got, want)) < 1e-5
    assert relative_error(jax.grad(value(jnp.einsum))(2 * x, weight), want[0]) > 1e-2  # the control


def _factors_of_weight_gradient(fn):
    """The axes that the gradient of a hidden layer's weight sums over, of its first and its second factor."""
    x, weight = jnp.ones((1, 64, 32)), jnp.ones((32, 48))
    loss = lambda x, w: jax.nn.silu(fn("btm,mf->btf", jnp.tanh(x), w)).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss, 1)).lower(x, weight).compile().as_text()
    ((first, second),) = re.findall(r"f32\[32,48\]\S* dot\(.*?lhs_c\S*=\{(\d)\}.*?rhs_c\S*=\{(\d)\}", text)
    return first, second


def test_gradients_of_weights_do_not_wait_for_activations_to_be_transposed():
    assert _factors_of_weight_gradient(einsum_of_rows) == ("0", "0")
    assert _factors_of_weight_gradient(jnp.einsum) == ("0", "1")  # the control: cotangents are transposed before
