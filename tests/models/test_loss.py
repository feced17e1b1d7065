import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec
from oracle import relative_error

import ring_attention as ra
from ring_attention.models.loss import chunked_cross_entropy
from ring_attention.planning.hlo import compiled

B, T, M, V = 2, 26, 6, 20


def _problem(B=B, T=T, M=M, V=V, scale=3.0):
    rng = np.random.default_rng(0)
    hidden, unembed = (jnp.asarray(rng.standard_normal(s) * scale, jnp.float32) for s in ((B, T, M), (M, V)))
    weights = jnp.asarray(rng.standard_normal((B, T)), jnp.float32)
    return hidden, unembed, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), weights


def _dense(hidden, unembed, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ unembed), targets[..., None], axis=-1)[..., 0]


def _chunked(mesh, chunk_size):
    tokens = Spec(None, "sp")
    return jax.shard_map(
        lambda hidden, unembed, targets: chunked_cross_entropy(hidden, unembed, targets, chunk_size=chunk_size),
        mesh=mesh,
        in_specs=(tokens, Spec(None, "tp"), tokens),
        out_specs=tokens,
    )


def _value_and_gradients(loss, hidden, unembed, targets, weights):
    """Losses, and the gradients of their weighted sum, the weights being random."""

    @jax.jit
    def run(hidden, unembed):
        losses, vjp = jax.vjp(lambda hidden, unembed: loss(hidden, unembed, targets), hidden, unembed)
        return losses, *vjp(weights)

    return run(hidden, unembed)


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
@pytest.mark.parametrize("shape", [dict(sp=2, tp=2), dict(sp=2, tp=1)], ids=str)
def test_any_chunk_size_gives_the_dense_loss_and_its_gradients(shape, chunk_size):
    problem = _problem()
    mesh = ra.make_mesh(**shape, devices=jax.devices()[: 2 * shape["tp"]])
    got = _value_and_gradients(_chunked(mesh, chunk_size), *problem)
    want = _value_and_gradients(_dense, *problem)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-5
    shifted = _dense(problem[0], problem[1], jnp.roll(problem[2], 1, axis=1))
    assert relative_error(got[0], shifted) > 0.1  # the control: the targets of the neighbours


def test_logits_far_beyond_the_range_of_exp_do_not_overflow():
    hidden, unembed, targets, _ = _problem(scale=100.0)
    got = _chunked(ra.make_mesh(sp=4, tp=2), 100)(hidden[:, :24], unembed, targets[:, :24])
    np.testing.assert_allclose(got, _dense(hidden[:, :24], unembed, targets[:, :24]), rtol=1e-4)
    assert np.abs(hidden @ unembed).max() > 1000


def test_bfloat16_states_give_a_float32_loss():
    hidden, unembed, targets, _ = _problem(T=16)
    rounded = [x.astype(jnp.bfloat16) for x in (hidden, unembed)]
    got = _chunked(ra.make_mesh(sp=4, tp=2), 100)(*rounded, targets)
    assert got.dtype == jnp.float32
    assert relative_error(got, _dense(*(x.astype(jnp.float32) for x in rounded), targets)) < 1e-5
    logits = (rounded[0] @ rounded[1]).astype(jnp.float32)
    in_bfloat16 = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    assert relative_error(got, in_bfloat16) > 1e-4  # the control: logits rounded to bfloat16


def test_logits_exist_for_one_chunk_of_tokens_only():
    tokens, vocabulary = 256, 512
    hidden, unembed, targets, weights = _problem(1, tokens, 4, vocabulary)
    mesh = ra.make_mesh(sp=1, devices=jax.devices()[:1])

    def widest(chunk_size):
        loss = _chunked(mesh, chunk_size)
        gradient = jax.jit(jax.grad(lambda *args: (loss(*args, targets) * weights).sum(), argnums=(0, 1)))
        program = gradient.lower(hidden, unembed).compile().as_text()
        return max(array.size for array in compiled.arrays(program))

    assert widest(16) <= 16 * vocabulary
    assert widest(tokens) >= tokens * vocabulary  # the control: one chunk of all tokens
