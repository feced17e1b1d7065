"""What `validate_config` lets pass can be traced, and what cannot be traced it refuses, before anything compiles."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from model_attention import attention_alone

from ring_attention.attention.kernels import cudnn
from ring_attention.checks import ConfigError
from ring_attention.parallel.mesh import SEQUENCE
from ring_attention.parallel.strategies import STRATEGIES
from ring_attention.training.flags import load_config
from ring_attention.training.validate import validate_config

MESH = dict(dp=1, fsdp=1, sp=2, tp=1)
SHARD = 256
HARDER = {  # what a kernel or a strategy may be unable to do
    "softcap": dict(softcap=30.0),
    "window": dict(window=100),
    "striped": dict(layout="striped"),
}


def config_of(dtype="bfloat16", **attention):
    config = load_config("configs/tiny.py")
    model = dataclasses.replace(config.model, compute_dtype=dtype, head_dim=32)
    attention = dataclasses.replace(config.attention, **attention)
    return dataclasses.replace(config, model=model, attention=attention, seq_len=2 * SHARD)


def traced(config):
    """Trace the attention of a training step as it is called on a device, and compile nothing."""
    model, tokens, shape = config.model, jax.P(None, SEQUENCE), (1, config.seq_len)
    q, kv = (
        jax.ShapeDtypeStruct((*shape, heads, model.head_dim), model.compute_dtype)
        for heads in (model.num_heads, model.num_kv_heads)
    )
    fn = attention_alone(config.attention, model, MESH[SEQUENCE])
    sharded = jax.shard_map(
        lambda q, k, v, segments: fn(q, k, v, segment_ids=segments),
        mesh=jax.sharding.AbstractMesh((MESH[SEQUENCE],), (SEQUENCE,), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(tokens,) * 4,
        out_specs=tokens,
    )
    return jax.eval_shape(sharded, q, kv, kv, jax.ShapeDtypeStruct(shape, jnp.int32))


@pytest.fixture
def _calls_cost_nothing(monkeypatch):
    """cuDNN's calls are planned and refused as ever, but each is traced as two zeros, which takes JAX no 0.1 s."""
    monkeypatch.setattr(
        cudnn, "_attention", lambda q, k, v, *_: (jnp.zeros_like(q), jnp.zeros_like(q[..., 0], jnp.float32))
    )


CASES = [("cudnn", name) for name in (*HARDER, "plain")] + [
    ("splash", "striped"),
    ("splash", "plain"),
    ("xla", "plain"),
]


@pytest.mark.usefixtures("_calls_cost_nothing")
@pytest.mark.parametrize(("impl", "name"), CASES)
def test_validate_config_refuses_just_what_cannot_be_traced(impl, name):
    for strategy in STRATEGIES:
        config = config_of(strategy=strategy, impl=impl, **HARDER.get(name, {}))
        try:
            traced(config)
            refusal = None
        except ValueError as error:
            refusal = str(error)
        if refusal is None:
            validate_config(config, MESH)
        else:
            with pytest.raises(ConfigError) as error:
                validate_config(config, MESH)
            assert str(error.value) == refusal


def test_validate_config_cases_hold_both_kinds():
    outcomes = set()
    for strategy, impl in itertools.product(("ring", "single_device"), ("xla", "cudnn")):
        try:
            validate_config(config_of(strategy=strategy, impl=impl, softcap=30.0), MESH)
            outcomes.add("passes")
        except ConfigError:
            outcomes.add("refused")
    assert outcomes == {"passes", "refused"}


def test_validate_config_refuses_softcap_of_a_kernel_without():
    with pytest.raises(ConfigError, match='impl="cudnn" has no softcap; leave it out, or use impl="xla"'):
        validate_config(config_of(impl="cudnn", softcap=30.0), MESH)
