import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.models.loss import chunked_cross_entropy, weighted_cross_entropy
from ring_attention.planning.hlo import compiled
from ring_attention.testing import relative_error

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


def _weighted(mesh, chunk_size):
    """The sum over devices of what `weighted_cross_entropy` gives each."""
    tokens = Spec(None, "sp")

    def on_device(*args):
        return jax.lax.psum(weighted_cross_entropy(*args, chunk_size=chunk_size), "sp")

    in_specs = (tokens, Spec(None, "tp"), tokens, tokens)
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=Spec())


MESHES = pytest.mark.parametrize("shape", [dict(sp=2, tp=2), dict(sp=2, tp=1)], ids=str)


@MESHES
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
def test_any_chunk_size_gives_the_dense_losses(shape, chunk_size):
    hidden, unembed, targets, _ = _problem()
    mesh = ra.make_mesh(**shape, devices=jax.devices()[: 2 * shape["tp"]])
    got = jax.jit(_chunked(mesh, chunk_size))(hidden, unembed, targets)
    assert relative_error(got, _dense(hidden, unembed, targets)) < 1e-5
    shifted = _dense(hidden, unembed, jnp.roll(targets, 1, axis=1))
    assert relative_error(got, shifted) > 0.1  # the control: the targets of the neighbours


@MESHES
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
def test_any_chunk_size_gives_the_dense_weighted_sum_and_its_gradients(shape, chunk_size):
    hidden, unembed, targets, weights = _problem()
    mesh = ra.make_mesh(**shape, devices=jax.devices()[: 2 * shape["tp"]])
    weighted = _weighted(mesh, chunk_size)

    def value_and_gradients(weighted_sum):
        scaled = lambda *args: 3 * weighted_sum(*args)  # noqa: E731 (a gradient that is not 1 comes in)
        return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1, 2)))(hidden, unembed, weights)

    def dense(hidden, unembed, weights):
        return (_dense(hidden, unembed, targets) * weights).sum()

    value, gradients = value_and_gradients(lambda hidden, unembed, weights: weighted(hidden, unembed, targets, weights))
    want, want_gradients = value_and_gradients(dense)
    assert abs(value - want) < 1e-5 * abs(want)
    for g, w in zip(gradients, want_gradients, strict=True):
        assert relative_error(g, w) < 1e-5
        assert relative_error(g, w / 3) > 0.1  # the control: the gradient that comes in left out
    undifferentiated = jax.jit(weighted)(hidden, unembed, targets, weights)
    assert abs(3 * undifferentiated - want) < 1e-5 * abs(want)


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


def test_gradients_of_a_bfloat16_unembedding_are_summed_in_float32():
    hidden, unembed, targets, _ = _problem(1, 1024, 6, 20, scale=1.0)
    rounded = [x.astype(jnp.bfloat16) for x in (hidden, unembed)]
    exact = [x.astype(jnp.float32) for x in rounded]
    ones = jnp.ones(targets.shape, jnp.float32)
    mesh = ra.make_mesh(sp=1, devices=jax.devices()[:1])
    want = jax.grad(lambda unembed: _dense(exact[0], unembed, targets).sum())(exact[1])
    weighted, chunked = _weighted(mesh, 4), _chunked(mesh, 4)
    got = jax.jit(jax.grad(lambda unembed: weighted(rounded[0], unembed, targets, ones)))(rounded[1])
    in_bfloat16 = jax.jit(jax.grad(lambda unembed: chunked(rounded[0], unembed, targets).sum()))(rounded[1])
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, want) < 4e-3
    assert relative_error(in_bfloat16, want) > 8e-3  # the control: a sum of 256 chunks in bfloat16


def _gradient_program(loss, problem):
    """The weighted sum and its gradients by hidden states and unembedding, as compiled text."""
    hidden, unembed, targets, weights = problem
    both = jax.value_and_grad(lambda hidden, unembed: loss(hidden, unembed, targets, weights), argnums=(0, 1))
    return jax.jit(both).lower(hidden, unembed).compile().as_text()


def test_logits_exist_for_one_chunk_of_tokens_only():
    tokens, vocabulary = 256, 512
    mesh = ra.make_mesh(sp=1, devices=jax.devices()[:1])

    def widest(chunk_size):
        program = _gradient_program(_weighted(mesh, chunk_size), _problem(1, tokens, 4, vocabulary))
        return max(array.size for array in compiled.arrays(program))

    assert widest(16) <= 16 * vocabulary
    assert widest(tokens) >= tokens * vocabulary  # the control: one chunk of all tokens


def test_gradients_take_three_products_with_the_vocabulary():
    mesh = ra.make_mesh(sp=1, devices=jax.devices()[:1])
    chunked = _chunked(mesh, 16)
    again = lambda hidden, unembed, targets, weights: (chunked(hidden, unembed, targets) * weights).sum()  # noqa: E731
    products = [
        _gradient_program(loss, _problem(1, 256, 4, 512)).count(" dot(") for loss in (_weighted(mesh, 16), again)
    ]
    assert products == [3, 4]  # the control: logits that are made again
