"""Gradients of sharp attention in 16 bits, and the four bits of out that they need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import PLAIN, quickly, ring_mesh

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.attention.rounding import restored, rounded
from ring_attention.testing import dense_errors, errors, oracle, random_qkv


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """`impl="rounded"` is a kernel whose backward pass has no more than the rounded output."""
    monkeypatch.setitem(kernels.KERNELS, "plain", PLAIN)
    monkeypatch.setitem(kernels.KERNELS, "rounded", PLAIN._replace(name="rounded", float32_out=False))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [6, 7])
def test_restored_output_has_the_bits_that_rounding_took(dtype, tokens):
    signs = np.random.default_rng(0).choice([-1, 1], (2, 3, tokens, 5))
    exact = jnp.float32(signs * np.geomspace(0.01, 100, signs.size).reshape(signs.shape)).at[0, 0, 0].set(0)
    out, rounding = rounded(exact, dtype)
    assert (out == exact.astype(dtype)).all()
    assert rounding.shape == (2, 3, (tokens + 1) // 2, 5)
    assert rounding.dtype == jnp.uint8
    eps = float(jnp.finfo(dtype).eps)
    lost, left = (np.abs(x.astype(jnp.float32) - exact).max() / 100 for x in (out, restored(out, rounding)))
    assert left < eps / 25 < eps / 4 < lost


def test_rounded_keeps_nothing_of_float32():
    exact = jnp.ones((1, 1, 2, 2)) / 3
    out, rounding = rounded(exact, "float32")
    assert rounding is None
    assert restored(out, rounding) is exact
    assert rounded(exact, "bfloat16", keep=False)[1] is None


def _gradients(attend):
    return quickly(lambda q, k, v, dout: (lambda out, vjp: (out, *vjp(dout)))(*jax.vjp(attend, q, k, v)))


ENTRIES = {
    "blockwise": ra.blockwise_attention,
    "ring": functools.partial(ra.ring_attention, layout="zigzag", mesh=ring_mesh(2)),
    "ulysses": functools.partial(ra.context_attention, strategy="ulysses", mesh=ring_mesh(2)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_gradients_of_sharp_attention_are_as_exact_as_dense(entry, dtype):
    layout = ra.SequenceLayout("zigzag" if entry == "ring" else "contiguous", 2)

    def ratios(impl, std):
        q, k, v, dout = random_qkv(0, 1, 128, 4, 2, 32, dtype)
        k = (k.astype(jnp.float32) * std).astype(dtype)
        got = gradients[impl](*(layout.permute(x, 1) for x in (q, k, v, dout)))
        got = [layout.unpermute(x, 1) for x in got]
        return np.divide(errors(got, oracle(q, k, v, dout)), dense_errors(q, k, v, dout))

    gradients = {impl: _gradients(functools.partial(ENTRIES[entry], impl=impl)) for impl in ("plain", "rounded")}
    for std in (1, 10, 50):  # of the logits
        assert max(ratios("plain", std)) < 1.5
    assert max(ratios("rounded", 50)) > 2  # the control
