"""Derivatives that attention does not have are refused in our words, and those that it has go on."""

import functools

import jax
import jax.numpy as jnp
import pytest
from ring_helpers import quickly, ring_mesh

import ring_attention as ra
from ring_attention.testing import random_qkv, relative_error

pytestmark = pytest.mark.usefixtures("plain_kernel")

Q, K, V, DQ = random_qkv(0, 1, 16, 4, 2, 8)


def decode(q, k, v):
    return ra.decode_attention(q[:, :1], k, v, mesh=ring_mesh(2), lengths=jnp.array([9], jnp.int32))


ENTRIES = {
    "blockwise": functools.partial(ra.blockwise_attention, impl="tiles"),
    "ring": functools.partial(ra.ring_attention, mesh=ring_mesh(2)),
    "ulysses": functools.partial(ra.context_attention, mesh=ring_mesh(2), strategy="ulysses"),
    "decode": decode,
}


def total(attend, q):
    return (attend(q, K, V) ** 2).sum()


@pytest.mark.parametrize("attend", ENTRIES.values(), ids=ENTRIES)
def test_gradient_of_a_gradient_names_forward_mode(attend):
    slope = jax.grad(functools.partial(total, attend))
    with pytest.raises(TypeError, match=r"reverse mode twice, need forward mode.*use jax\.jvp\(jax\.grad\(fn\)"):
        jax.jit(jax.grad(lambda q: (slope(q) * DQ).sum())).trace(Q)


@pytest.mark.parametrize("attend", ENTRIES.values(), ids=ENTRIES)
def test_forward_mode_names_reverse_mode(attend):
    with pytest.raises(
        TypeError, match=r"forward-mode differentiation .* need reverse mode; use jax\.grad or jax\.vjp"
    ):
        jax.jvp(lambda q: attend(q, K, V), (Q,), (DQ,))


def test_only_reverse_mode_keeps_other_type_errors():
    with pytest.raises(TypeError, match="missing 1 required positional"):
        ra.blockwise_attention(Q, K)


def test_hessian_is_that_of_dense_attention():
    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def hessian(attend):
        q = jnp.asarray(Q[:, :3])
        attend = functools.partial(attend, k=K[:, :3], v=V[:, :3])
        return quickly(jax.hessian(lambda x: (attend(q.at[0, 2, 0, :2].set(x)) ** 2).sum()))(q[0, 2, 0, :2])

    assert relative_error(hessian(ENTRIES["blockwise"]), hessian(dense)) < 1e-5
