"""`jax.vmap(..., spmd_axis_name=)` around calls: what is mapped is sharded over another axis of the mesh."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from ring_helpers import quickly

import ring_attention as ra
from ring_attention.testing import random_qkv, relative_error

pytestmark = pytest.mark.usefixtures("plain_kernel")

N, T, H, K, D = 4, 8, 4, 2, 8
SPEC = P(None, "sp")


def _mesh():
    return ra.make_mesh(dp=2, sp=2, devices=jax.devices()[:4])


def _one(q, k, v, sinks, spec=SPEC, **arguments):
    """Attention of a model that is written for one sequence."""
    return ra.context_attention(q[None], k[None], v[None], mesh=_mesh(), sinks=sinks, spec=spec, **arguments)[0]


def _mapped(spmd_axis_name, **arguments):
    one = functools.partial(_one, **arguments)
    return jax.vmap(one, in_axes=(0, 0, 0, None), spmd_axis_name=spmd_axis_name)


def _arrays(count=N):
    return *random_qkv(0, count, T, H, K, D)[:3], jnp.array([0.0, 1.0, 0.5, 0.0])


def test_mapped_attention_gives_the_same_sharded_over_dp():
    def of(attend):
        loss = lambda *arrays: (attend(*arrays) ** 2).sum()  # noqa: E731
        return quickly(lambda *arrays: (attend(*arrays), *jax.grad(loss, (0, 1, 2, 3))(*arrays)))(*_arrays())

    got, want = of(_mapped("dp", spec=None)), of(_mapped(None))
    assert got[0].sharding.spec[:2] == ("dp", "sp")
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize(
    ("strategy", "impl"),
    [("all_gather", "auto"), ("usp", "tiles"), ("sparse", "auto"), ("ring_self_attention", "auto")],
)
def test_mapped_gradients_of_every_strategy_are_traced(strategy, impl):
    options = dict(stride=4) if strategy == "sparse" else {}
    key = dict(dropout_rate=0.1, dropout_key=jax.random.key(0))
    attend = functools.partial(_one, strategy=strategy, impl=impl, **options, **key)
    slope = jax.grad(lambda *arrays: attend(*arrays).sum(), (0, 3))
    mapped = jax.vmap(slope, in_axes=(0, 0, 0, None), spmd_axis_name="dp")
    assert [x.shape for x in jax.eval_shape(mapped, *_arrays())] == [(N, T, H, D), (N, H)]


def test_mapped_decoding_is_traced():
    q, k, v, _ = _arrays()
    decode = functools.partial(ra.decode_attention, mesh=_mesh(), lengths=jnp.array([5], jnp.int32))
    one = lambda q, k, v: decode(q[None, :1], k[None], v[None])[0]  # noqa: E731
    assert jax.eval_shape(jax.vmap(one, spmd_axis_name="dp"), q, k, v).shape == (N, 1, H, D)


@pytest.mark.parametrize(
    ("spmd_axis_name", "arguments", "count", "words"),
    [
        ("dp", dict(spec=P("dp", "sp")), N, "names 'dp', the spmd_axis_name of a jax.vmap around .*drop it from one"),
        ("sp", {}, N, "axis_name='sp' is the spmd_axis_name of a jax.vmap around this call, need another axis"),
        ("dp", {}, 3, "what jax.vmap maps=3 is not divisible by dp=2; pad what is mapped"),
    ],
)
def test_mapped_attention_refuses_what_it_cannot_do(spmd_axis_name, arguments, count, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(_mapped(spmd_axis_name, **arguments), *_arrays(count))
