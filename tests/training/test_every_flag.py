"""Every flag of what a model computes: it changes the loss, and the loss is the same on any mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from quick_compile import OPTIONS

import ring_attention as ra
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.rope import RopeConfig
from ring_attention.models.transformer import abstract_parameters, parameter_specs, resized_parameters
from ring_attention.training.config import AttentionConfig, MeshConfig, OptimizerConfig, TrainConfig
from ring_attention.training.step import BATCH_SPEC, _sum_of_losses, make_gradients

pytestmark = pytest.mark.usefixtures("plain_kernel")

ROWS, SEQ_LEN, VOCABULARY = 4, 32, 32
MODEL = ModelConfig(
    vocab_size=VOCABULARY, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=16, ffn_chunk=8
)
MESHES = {1: dict(sp=1), 2: dict(sp=2), 8: dict(fsdp=2, sp=2, tp=2)}

GROWN = RopeConfig(scaling="yarn", factor=4.0, original_len=8, query_growth=0.5)
LONG = RopeConfig(scaling="longrope", factor=4.0, original_len=8, short_factors=(1.0,) * 4, long_factors=(1.0, 2.0) * 2)
NEAR, NOWHERE = LayerKind(window=5), LayerKind(rope=RopeConfig(fraction=0.0))
OF_MODEL = dict(
    value_head_dim=[4, 12],
    layers=[
        (NEAR, LayerKind()),
        (NOWHERE,),
        (LayerKind(chunk=8), NEAR),
        (LayerKind(sinks=True), LayerKind(softcap=1.0)),
    ],
    attention_scale=[0.5],
    norm=["layer"],
    norm_place=["after", "both", "parallel"],
    norm_zero_centered=[True],
    norm_epsilon=[0.1],
    activation=["gelu_tanh", "clamped_silu"],
    embedding_scale=[4.0],
    residual_scale=[0.5],
    logit_scale=[0.5],
    logit_softcap=[1.0],
    tied_embeddings=[True],
    qkv_bias=[True],
    out_bias=[True],
    ffn_bias=[True],
    qk_norm=[True],
    rope=[RopeConfig(theta=100.0), RopeConfig(fraction=0.5), GROWN, LONG],
)
OF_ATTENTION = dict(window=[5], chunk=[8], max_segment_len=[10], softcap=[1.0], sinks=[True], alibi=[True])
OF_ATTENTION |= dict(dropout_rate=[0.1])
FLAGS = [("model", name, value) for name, values in OF_MODEL.items() for value in values]
FLAGS += [("attention", name, value) for name, values in OF_ATTENTION.items() for value in values]
FLAGS += [("both", "qk_norm_across", True)]
NAMES = [f"{section}.{name}={str(value)[:30]}" for section, name, value in FLAGS]

TOGETHER = {
    "Gemma 3": (
        dict(num_layers=5, layers=(NEAR, NEAR, LayerKind(rope=RopeConfig(theta=100.0))), norm_place="both")
        | dict(norm_zero_centered=True, qk_norm=True, activation="gelu_tanh", logit_softcap=2.0, tied_embeddings=True),
        dict(softcap=2.0, dropout_rate=0.2),
    ),
    "gpt-oss": (
        dict(num_layers=3, layers=(NEAR, LayerKind()), qkv_bias=True, out_bias=True, ffn_bias=True)
        | dict(activation="clamped_silu", head_groups=1),
        dict(sinks=True, dropout_rate=0.1),
    ),
    "ALiBi by groups": (
        dict(num_heads=8, num_kv_heads=4, head_groups=2, rope=RopeConfig(fraction=0.0), value_head_dim=4, remat="full"),
        dict(alibi=True, sinks=True, dropout_rate=0.3, strategy="ulysses"),
    ),
}


def config_of(model=None, attention=None, devices=1, **settings):
    """A config with changes to its sections."""
    optimizer = OptimizerConfig(warmup_steps=1, accumulation_steps=settings.pop("accumulation_steps", 1))
    return TrainConfig(
        name="flags",
        model=dataclasses.replace(MODEL, **(model or {})),
        seq_len=SEQ_LEN,
        batch_size=ROWS,
        eval_sequences=ROWS,
        num_steps=4,
        mesh=MeshConfig(**{**dict(sp=1), **MESHES[devices]}),
        attention=AttentionConfig(block_q=8, block_kv=8, **(attention or {})),
        optimizer=optimizer,
        **settings,
    )


def changed(section, name, value, **settings):
    """The config with one flag set, or with what another flag needs."""
    if section == "both":
        return config_of(model=dict(qk_norm=True) | {name: value}, **settings)
    return config_of(**{section: {name: value}}, **settings)


def inputs(config, mesh):
    """Parameters at random, norms and biases too, and packed rows, sharded."""
    rng = np.random.default_rng(0)
    draw = lambda x: 0.5 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    params = jax.tree.map(draw, abstract_parameters(config.transformer))
    params = resized_parameters(params, config.transformer, mesh.shape)
    specs = jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(config.transformer))
    tokens = rng.integers(0, VOCABULARY, (ROWS, SEQ_LEN + 1))
    batch = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=np.tile(np.r_[0:20, 0:12], (ROWS, 1)),
        segment_ids=np.tile(np.r_[[1] * 20, [2] * 12], (ROWS, 1)),
        loss_mask=np.ones((ROWS, SEQ_LEN)),
    )
    layout, sharding = config.attention.make_layout(mesh.shape["sp"]), NamedSharding(mesh, BATCH_SPEC)
    batch = {name: jax.device_put(layout.permute(x.astype(np.int32), 1), sharding) for name, x in batch.items()}
    return jax.device_put(params, specs), batch


def mesh_of(config):
    """The config's mesh, of the first devices."""
    sizes = dataclasses.asdict(config.mesh)
    return ra.make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


@functools.cache
def loss(config):
    """Nats per target of the first batch in training."""
    mesh = mesh_of(config)
    specs = (parameter_specs(config.transformer), BATCH_SPEC)
    sums = _sum_of_losses(config, mesh, training=True)
    run = jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=(jax.P(), jax.P()))
    nats, targets = jax.jit(run, compiler_options=OPTIONS)(*inputs(config, mesh))
    return float(nats / targets)


@pytest.mark.slow
@pytest.mark.parametrize(("section", "name", "value"), FLAGS, ids=NAMES)
def test_flag_changes_the_loss(section, name, value):
    plain = config_of(model=dict(qk_norm=True)) if section == "both" else config_of()
    assert abs(loss(changed(section, name, value)) / loss(plain) - 1) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("section", "name", "value"), FLAGS, ids=NAMES)
def test_flag_gives_the_same_loss_on_any_mesh(section, name, value):
    losses = [loss(changed(section, name, value, devices=devices)) for devices in MESHES]
    assert np.abs(np.array(losses) / losses[0] - 1).max() < 1e-5


@functools.cache
def step_of(config):
    """(loss, gradients without the padding of a mesh) of the third step."""
    mesh = mesh_of(config)
    grads, nats, _ = jax.jit(make_gradients(config, mesh), compiler_options=OPTIONS)(*inputs(config, mesh), 2)
    return float(nats), resized_parameters(jax.device_get(grads), config.transformer)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("case", TOGETHER)
@pytest.mark.slow
def test_flags_together_give_the_same_gradients_on_any_mesh(case, devices):
    model, attention = TOGETHER[case]
    nats, grads = step_of(config_of(model, attention))
    other, others = step_of(config_of(model, attention, devices))
    assert abs(other / nats - 1) < 1e-5
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), grads, others))) < 1e-5 * scale
    assert min(np.abs(x).max() for x in jax.tree.leaves(grads)) > 0  # every parameter is used


def test_dropout_follows_the_step_and_not_the_micro_batches():
    attention = dict(dropout_rate=0.2)
    nats = [loss(config_of(attention=attention, seed=seed)) for seed in (0, 1)]
    assert nats[0] != nats[1]
    config = config_of(attention=attention)
    mesh = mesh_of(config)
    run = jax.jit(make_gradients(config, mesh), compiler_options=OPTIONS)
    params, batch = inputs(config, mesh)
    of_steps = [float(run(params, batch, step)[1]) for step in (0, 1)]
    assert of_steps[0] == pytest.approx(nats[0], rel=1e-6)
    assert abs(of_steps[1] / of_steps[0] - 1) > 1e-4
    halves = config_of(attention=attention, accumulation_steps=2)
    again = jax.jit(make_gradients(halves, mesh), compiler_options=OPTIONS)(params, batch, 0)[1]
    assert float(again) == pytest.approx(of_steps[0], rel=1e-5)
