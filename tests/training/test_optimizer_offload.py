"""State in the memory of the host (`optimizer.offload`): on CPU, whose JAX has such a memory beside that of devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.parallel import host_memory
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import MeshConfig, OptimizerConfig, TrainConfig
from ring_attention.training.fault_tolerance.nonfinite import find_origin
from ring_attention.training.state import make_optimizer, make_state, sharded_abstract_state
from ring_attention.training.step import BATCH_SPEC, make_eval_step, make_train_step

SIZES = dict(vocab_size=32, num_layers=5, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24)
MODEL = ModelConfig(**SIZES, layers=(LayerKind(window=8), LayerKind(sinks=True)))  # two periods and a rest
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=0.1, accumulation_steps=2)  # clips each step
CONFIG = TrainConfig(
    name="offload",
    model=MODEL,
    seq_len=32,
    num_steps=100,
    batch_size=4,
    mesh=MeshConfig(fsdp=2, sp=1),
    optimizer=OPTIMIZER,
)
STEPS = 3


def config_of(offload):
    return dataclasses.replace(CONFIG, optimizer=dataclasses.replace(OPTIMIZER, offload=offload))


@functools.cache
def mesh_of():
    return ra.make_mesh(fsdp=2, sp=1, devices=jax.devices()[:2])


@functools.cache
def step_of(offload):
    return make_train_step(config_of(offload), mesh_of())


@functools.cache
def trained(offload):
    """(state, numbers of each step) after STEPS steps."""
    rng, sharding = np.random.default_rng(0), NamedSharding(mesh_of(), BATCH_SPEC)
    tokens = rng.integers(0, MODEL.vocab_size, (4, 33), np.int32)
    fields = dict(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=np.arange(32, dtype=np.int32)[None].repeat(4, 0)
    )
    fields |= dict.fromkeys(("segment_ids", "loss_mask"), np.ones((4, 32), np.int32))
    batch = {name: jax.device_put(field, sharding) for name, field in fields.items()}
    state, numbers = make_state(config_of(offload), mesh_of()), []
    for _ in range(STEPS):
        state, found = step_of(offload)(state, batch)
        numbers.append(jax.device_get(found))
    return state, numbers, batch


def kinds_of(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_offload_says_what_lies_in_the_memory_of_the_host():
    adam = optax.tree_utils.tree_get
    for offload, of_params in (("none", "device"), ("moments", "device"), ("parameters", "pinned_host")):
        state = trained(offload)[0]
        assert kinds_of(state.params["layers"]) == {of_params}
        of_moments = {"device"} if offload == "none" else {"pinned_host"}
        assert kinds_of([adam(state.opt_state, name)["layers"] for name in ("mu", "nu")]) == of_moments
        assert kinds_of((state.params["embed"], adam(state.opt_state, "mu")["embed"], state.step)) == {"device"}


def test_offloaded_steps_are_those_on_the_device():
    # Of two micro-batches, whose gradients are clipped.
    (want, numbers, _), *others = (trained(offload) for offload in ("none", "moments", "parameters"))
    initial = jax.device_get(make_state(CONFIG, mesh_of()).params)
    for state, found, _ in others:
        assert all(x["grad_norm"] > OPTIMIZER.clip_norm for x in found)
        for mine, theirs in zip(found, numbers, strict=True):
            assert all(abs(mine[name] - theirs[name]) <= 1e-6 * theirs[name] for name in theirs)
        change = jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, initial)
        change_there = jax.tree.map(lambda x, y: np.asarray(x) - y, want.params, initial)
        errors = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), change, change_there)
        assert max(jax.tree.leaves(errors)) < 1e-4


def test_clipping_each_layer_by_its_own_norm_would_differ():
    # The control of the tolerance above: the update of a step whose layers are updated one by one, each with its norm.
    optimizer = make_optimizer(CONFIG)
    grads = {"layers": {"w": jnp.ones((2, 8))}, "embed": jnp.ones(8)}
    whole = optimizer.update(grads, optimizer.init(grads), grads)[1]
    part = {"layers": {"w": grads["layers"]["w"][:1]}}
    alone = optimizer.update(part, optimizer.init(part), part)[1]
    given = optimizer.update(part, optimizer.init(part), part, norm=optax.tree.norm(grads))[1]
    mean = [optax.tree_utils.tree_get(state, "mu")["layers"]["w"][0] for state in (whole, alone, given)]
    assert np.array_equal(mean[0], mean[2])
    assert np.abs(mean[0] - mean[1]).max() > 1e-2 * np.abs(mean[0]).max()


def test_a_step_that_is_not_finite_leaves_all_as_it_was_on_the_host():
    state, _, batch = trained("parameters")
    embed = state.params["embed"].at[0].set(jnp.inf)
    copy = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), state)
    bad = copy._replace(params=copy.params | {"embed": embed})
    before = bits((bad.params, bad.opt_state))
    after, numbers = step_of("parameters")(bad, batch)
    assert bits((after.params, after.opt_state)) == before
    assert numbers["skipped"] == 1
    assert find_origin(config_of("parameters"), mesh_of(), after.params, batch).startswith("parameter embed holds")


def test_a_checkpoint_goes_from_the_host_to_the_device_and_back(tmp_path):
    state = trained("parameters")[0]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(STEPS, state, {})
        for offload in ("parameters", "none"):
            wanted = sharded_abstract_state(config_of(offload), mesh_of())
            restored = checkpoints.restore(STEPS, wanted).state
            assert bits(restored) == bits(state)
            assert jax.tree.map(lambda x: x.sharding.memory_kind, restored) == jax.tree.map(
                lambda x: x.sharding.memory_kind, wanted
            )


def test_held_out_losses_are_those_of_parameters_on_the_device():
    state, _, batch = trained("parameters")
    evaluate = make_eval_step(CONFIG, mesh_of())
    on_device = jax.device_put(state.params, sharded_abstract_state(CONFIG, mesh_of()).params["norm"]["scale"].sharding)
    assert kinds_of(on_device) == {"device"}
    np.testing.assert_allclose(evaluate(state.params, batch)[0], evaluate(on_device, batch)[0], rtol=1e-6)


def test_the_first_state_is_that_on_the_device():
    assert bits(make_state(config_of("parameters"), mesh_of())) == bits(make_state(CONFIG, mesh_of()))


def test_devices_without_such_a_memory_are_refused(monkeypatch):
    monkeypatch.setattr(host_memory, "PINNED_HOST", "no_such_memory")
    with pytest.raises(ConfigError, match=r"optimizer.offload: .* has no memory of the kind 'no_such_memory'"):
        host_memory.on_host(NamedSharding(mesh_of(), PartitionSpec()))


def test_an_unknown_offload_is_refused():
    with pytest.raises(
        ConfigError, match="optimizer.offload=.disk.: is not known; choose one of none, moments, parame"
    ):
        OptimizerConfig(offload="disk")


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
