"""A training run is the same whichever strategy its attention takes."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.training.config import AttentionConfig, MeshConfig, OptimizerConfig, TrainConfig
from ring_attention.training.state import make_state
from ring_attention.training.step import BATCH_SPEC, make_train_step
from ring_attention.training.validate import validate_config

STEPS, SEQ_LEN, ROWS = 50, 64, 2
MODEL = ModelConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24)


def _config(**attention):
    return TrainConfig(
        name="strategies",
        model=MODEL,
        seq_len=SEQ_LEN,
        num_steps=STEPS,
        batch_size=ROWS,
        mesh=MeshConfig(dp=2, sp=4),
        attention=AttentionConfig(block_q=8, block_kv=8, **attention),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    )


def _losses(**attention):
    """Of a run of 50 steps over packed rows, the same for every run."""
    config = _config(**attention)
    mesh = ra.make_mesh(**dataclasses.asdict(config.mesh))
    layout = config.attention.make_layout(mesh.shape["sp"])
    state, step, losses = make_state(config, mesh), make_train_step(config, mesh), []
    rng, sharding = np.random.default_rng(0), NamedSharding(mesh, BATCH_SPEC)
    for _ in range(STEPS):
        tokens = np.cumsum(rng.integers(1, 3, (ROWS, SEQ_LEN + 1)), axis=1) % MODEL.vocab_size
        batch = dict(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            positions=np.tile(np.r_[0:40, 0:24], (ROWS, 1)),
            segment_ids=np.tile(np.r_[[1] * 40, [2] * 24], (ROWS, 1)),
            loss_mask=np.ones((ROWS, SEQ_LEN)),
        )
        batch = {name: jax.device_put(layout.permute(x.astype(np.int32), 1), sharding) for name, x in batch.items()}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.fixture(scope="module")
def by_ring():
    return _losses()


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention",
    [
        dict(strategy="all_gather"),
        dict(strategy="ulysses"),
        pytest.param(dict(strategy="usp", ulysses_size=2), marks=pytest.mark.nightly),
        dict(strategy="ring_self_attention"),
        pytest.param(dict(speeds="1 0.5 1 2"), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_strategy_gives_the_ring_losses_for_fifty_steps(attention, by_ring):
    assert by_ring[-5:].mean() < 0.5 * by_ring[0]  # it learns, so that errors would add up
    assert np.abs(_losses(**attention) / by_ring - 1).max() < 1e-4


@pytest.mark.slow
def test_window_gives_other_losses(by_ring):
    """The control of the tolerance above."""
    assert np.abs(_losses(strategy="sliding_window", window=2) / by_ring - 1).max() > 1e-2


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (dict(strategy="rings"), "attention.strategy='rings': is not known; choose one of single_device, all_gather"),
        (
            dict(strategy="usp", duplex=True),
            "attention.duplex=True: is no option of attention.strategy='usp'; leave it",
        ),
        (dict(stride=4), "attention.stride=4: is no option of attention.strategy='ring'"),
        (dict(ulysses_size=-1), "attention.ulysses_size=-1: must not be negative"),
        (dict(speeds="1 fast"), "attention.speeds='1 fast' must be positive numbers with spaces between"),
        (dict(speeds="1 0 1 1"), "attention.speeds='1 0 1 1' must be positive numbers"),
    ],
)
def test_attention_config_that_means_nothing_is_refused(attention, message):
    with pytest.raises(ConfigError) as error:
        _config(**attention)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (dict(strategy="single_device"), "needs the whole sequence on one device, but 'sp' has 4"),
        (dict(strategy="sliding_window"), "got no window"),
        (dict(strategy="usp", ulysses_size=3), "ulysses_size=3 must divide the 4 devices"),
        (dict(strategy="sparse", stride=3), "got stride=3, need a multiple of the 4 devices"),
        (dict(speeds="1 1 1"), "layout is for ring_size=3, but the mesh axis has 4 devices"),
    ],
)
def test_validate_config_says_what_a_strategy_cannot_do(attention, message):
    with pytest.raises(ConfigError) as error:
        validate_config(_config(**attention), dict(dp=2, fsdp=1, sp=4, tp=1))
    assert message in str(error.value)


def test_validate_config_refuses_a_kernel_for_other_devices():
    config = _config(impl="splash")
    config = dataclasses.replace(config, seq_len=4096)
    validate_config(config, dict(dp=2, fsdp=1, sp=4, tp=1), "tpu")
    with pytest.raises(ConfigError, match="impl='splash' runs on tpu devices, but these are cpu; use impl="):
        validate_config(config, dict(dp=2, fsdp=1, sp=4, tp=1), "cpu")


def test_validate_config_refuses_offloaded_head_groups_on_tpu():
    model = dataclasses.replace(MODEL, remat="offload", head_groups=2)
    config = dataclasses.replace(_config(), model=model)
    shape = dict(dp=2, fsdp=1, sp=4, tp=1)
    validate_config(config, shape, "gpu")
    validate_config(dataclasses.replace(config, model=dataclasses.replace(model, remat="offload_input")), shape, "tpu")
    with pytest.raises(ConfigError, match='head_groups=2 with model.remat="offload": .* use remat="offload_input"'):
        validate_config(config, shape, "tpu")
