import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import ring_attention as ra
from ring_attention.models.config import ModelConfig
from ring_attention.training.config import AttentionConfig, MeshConfig, OptimizerConfig, TrainConfig
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.fault_tolerance.nonfinite import NonFiniteGuard, find_origin
from ring_attention.training.state import make_state
from ring_attention.training.step import BATCH_SPEC, make_train_step

MODEL = ModelConfig(vocab_size=32, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24)
CONFIG = TrainConfig(
    name="nonfinite",
    model=MODEL,
    seq_len=32,
    num_steps=200,
    batch_size=2,
    mesh=MeshConfig(fsdp=1, sp=2, tp=2),
    attention=AttentionConfig(block_q=8, block_kv=8),
    optimizer=OptimizerConfig(accumulation_steps=2, max_skipped_updates=3),
)


@pytest.fixture(scope="module")
def mesh():
    return ra.make_mesh(sp=2, tp=2, devices=jax.devices()[:4])


@pytest.fixture(scope="module")
def step(mesh):
    return make_train_step(CONFIG, mesh)


@pytest.fixture(scope="module")
def first_state(mesh):
    return make_state(CONFIG, mesh)


@pytest.fixture
def state(first_state):
    return jax.tree.map(jnp.copy, first_state)  # a step takes the buffers of the state that it is given


@pytest.fixture(scope="module")
def rows():
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 32))
    places = np.broadcast_to(np.arange(32), (2, 32))
    fields = dict(tokens=tokens, targets=tokens, positions=places, segment_ids=np.ones((2, 32)), loss_mask=places < 30)
    return {name: np.asarray(field, np.int32) for name, field in fields.items()}


@pytest.fixture(scope="module")
def batch(rows, mesh):
    return jax.device_put(rows, NamedSharding(mesh, BATCH_SPEC))


def changed(params, layer, change, path=("attention", "query")):
    """The parameters with `change` made to one weight of one layer."""
    params = jax.tree.map(lambda x: x, params)
    inner = params["layers"]
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = inner[path[-1]].at[layer].set(change(inner[path[-1]][layer]))
    return params


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_step_leaves_out_and_counts_a_nonfinite_update(state, step, batch):
    good, _ = step(state, batch)
    bad = good._replace(params=changed(good.params, 1, lambda w: w * jnp.inf))
    before = bits((bad.params, bad.opt_state))
    after, numbers = step(bad, batch)
    assert bits((after.params, after.opt_state)) == before
    assert (int(after.step), int(after.skipped), float(numbers["skipped"])) == (2, 1, 1)
    assert not np.isfinite(numbers["loss"])


def test_step_makes_a_finite_update_uncounted(state, step, batch):
    before = bits(state.params)
    after, numbers = step(state, batch)
    assert all(x != y for x, y in zip(bits(after.params), before, strict=True))
    assert (int(after.skipped), float(numbers["skipped"])) == (0, 0)


def test_find_origin_names_a_nonfinite_parameter_and_layer(state, mesh, batch):
    params = changed(state.params, 2, lambda w: w.at[3].set(jnp.nan))
    assert find_origin(CONFIG, mesh, params, batch) == (
        "parameter layers.attention.query of layer 2 holds a number that is not finite"
    )


@pytest.mark.parametrize("layer", [0, 2])
def test_find_origin_names_the_layer_overflowing_forward(state, mesh, batch, layer):
    params = changed(state.params, layer, lambda w: w + 3e38, path=("attention", "out"))
    assert find_origin(CONFIG, mesh, params, batch) == (f"going forward they first appear in layer {layer} of 3")


@pytest.mark.slow
def test_find_origin_names_the_layer_overflowing_backward(state, mesh, batch):
    params = changed(state.params, 1, lambda w: 0 * w, path=("feedforward", "up"))  # so that the next adds nothing
    params = changed(params, 1, lambda w: 0 * w + 3e38, path=("feedforward", "down"))
    assert find_origin(CONFIG, mesh, params, batch) == "going backward they first appear in layer 1 of 3"


@pytest.mark.slow
def test_find_origin_of_healthy_numbers_is_none(state, mesh, batch):
    assert find_origin(CONFIG, mesh, state.params, batch) == "each gradient is finite, their norm is not"


def test_guard_ends_the_run_with_step_batch_and_layer(state, mesh, batch, rows, tmp_path):
    params = changed(state.params, 1, lambda w: w * jnp.inf)
    guard = NonFiniteGuard(CONFIG, mesh, tmp_path)
    for step, skipped in enumerate([1, 1, 0, 1, 1, 1], start=1):
        guard.watch(step, {"skipped": jnp.float32(skipped)}, batch, rows)
        if step < 6:
            guard.settle(params)
    with pytest.raises(RunError) as error:
        guard.settle(params)
    message = str(error.value)
    assert message.startswith("step 6: the loss or its gradient was not finite 3 times in a row")
    assert "parameter layers.attention.query of layer 1 holds" in message
    assert "\n" not in message
    (file,) = tmp_path.iterdir()
    assert str(file) in message
    with np.load(file) as saved:
        assert {name: saved[name].tolist() for name in saved} == {name: row.tolist() for name, row in rows.items()}


def test_max_skipped_updates_must_be_positive():
    with pytest.raises(ValueError, match="optimizer.max_skipped_updates=0: must be positive"):
        dataclasses.replace(CONFIG.optimizer, max_skipped_updates=0)
