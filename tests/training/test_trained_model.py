"""A run's parameters come back on any mesh, without what the optimizer keeps, and are checked."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.models.transformer import resized_parameters
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import TrainConfig
from ring_attention.training.fault_tolerance.integrity import sign
from ring_attention.training.run_folder import open_run_folder
from ring_attention.training.state import abstract_state, make_state, sharded_abstract_state
from ring_attention.training.trained_model import open_trained_model

MODEL = ModelConfig(vocab_size=40, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=24)
CONFIG = TrainConfig(name="x", model=MODEL, seq_len=64, num_steps=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a run's folder with two checkpoints, the parameters of the newer one)."""
    path = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(CONFIG, run_dir=str(path))
    mesh = ra.make_mesh(fsdp=2, sp=2, tp=2)
    states = [make_state(dataclasses.replace(config, seed=seed), mesh) for seed in (1, 2)]
    with open_run_folder(config) as folder, Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(3, states[0], {})
        checkpoints.save(10, states[1], {})
    return path, jax.device_get(states[1].params)


def test_checkpoint_of_padded_parameters_comes_back_on_every_mesh(tmp_path):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path))
    three, six = (ra.make_mesh(sp=3, tp=n // 3, devices=jax.devices()[:n]) for n in (3, 6))
    two = ra.make_mesh(sp=2, devices=jax.devices()[:2])
    state = make_state(config, three)
    assert state.params["embed"].shape == (40, 18)
    with open_run_folder(config) as folder, Checkpoints(folder.checkpoints, abstract_state(config)) as checkpoints:
        checkpoints.save(1, state, {})
        back = checkpoints.restore(1, sharded_abstract_state(config, two)).state
        checkpoints.save(2, back, {})
        again = checkpoints.restore(2, sharded_abstract_state(config, six)).state
    assert (back.params["embed"].shape, again.params["embed"].shape) == ((40, 16), (40, 18))
    for got in (back, again):
        cut = resized_parameters(got.params, MODEL)
        assert same(cut, resized_parameters(state.params, MODEL))
        assert not same(cut, jax.tree.map(lambda x: x + 1, cut))  # the control
    assert same(again.params, state.params)
    for mesh, width in ((two, 16), (three, 18)):
        for step in (1, 2):
            params = open_trained_model(str(tmp_path / "checkpoints" / str(step))).load(mesh)
            assert params["embed"].shape == (40, width)
            assert same(resized_parameters(params, MODEL), back.params)


def test_checkpoint_of_a_wider_model_is_refused_where_padding_is_not(tmp_path):
    with Checkpoints(tmp_path, abstract_state(CONFIG)) as checkpoints:
        wider = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, model_dim=12))
        mesh = ra.make_mesh(sp=2, devices=jax.devices()[:2])
        with Checkpoints(tmp_path, abstract_state(wider)) as other:
            other.save(1, make_state(wider, mesh), {})
        checkpoints._manager.reload()
        with pytest.raises(ConfigError, match=r"embed is float32\[40, 12\], this run needs float32\[40, 16\]"):
            checkpoints.restore(1, sharded_abstract_state(CONFIG, mesh))


def same(params, want):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True))


@pytest.mark.parametrize("mesh", [dict(sp=8), dict(dp=2, sp=2, tp=2), dict(sp=1, devices=jax.devices()[:1])])
def test_trained_model_loads_the_newest_on_any_mesh(run, mesh):
    path, want = run
    trained = open_trained_model(str(path))
    assert (trained.config.model, trained.checkpoint) == (MODEL, path / "checkpoints" / "10")
    mesh = ra.make_mesh(**mesh)
    params = trained.load(mesh)
    assert same(params, want)
    shard = params["layers"]["attention"]["query"].sharding.shard_shape((2, 16, 4, 6))
    assert shard == (2, 16 // mesh.shape["sp"], 4 // mesh.shape["tp"], 6)
    older = open_trained_model(str(path / "checkpoints" / "3")).load(mesh)
    assert not same(older, want)  # the control


def test_trained_model_rounds_to_another_dtype_once(run):
    path, want = run
    params = open_trained_model(str(path)).load(ra.make_mesh(sp=8), "bfloat16")
    assert same(params, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), want))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_trained_model_loads_only_the_parameters(run):
    before = jax.live_arrays()
    params = open_trained_model(str(run[0])).load(ra.make_mesh(sp=8))
    new = [x for x in jax.live_arrays() if all(x is not y for y in before)]
    assert sum(x.nbytes for x in new) < 1.5 * sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore's futures
def test_trained_model_notices_changed_parameters(run, tmp_path):
    path, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    contents = copy / "checkpoints" / "10" / "data" / "metadata"
    values = json.loads(contents.read_text())
    del values["digest"]
    values["fingerprints"]["params.layers.attention.query"] += 1
    contents.write_text(json.dumps(sign(values)))
    with pytest.raises(ConfigError, match=r"10': params.layers.attention.query changed since it was written; give an"):
        open_trained_model(str(copy)).load(ra.make_mesh(sp=8))
    shutil.rmtree(copy / "checkpoints" / "10" / "state" / "d")
    with pytest.raises(ConfigError, match="checkpoints/10 is damaged: 'state/d/.*' is not as it was written"):
        open_trained_model(str(copy)).load(ra.make_mesh(sp=8))
    assert open_trained_model(str(copy / "checkpoints" / "3")).load(ra.make_mesh(sp=8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path / "nowhere", "has no config.json; give the folder of a run"),
        (lambda path: path / "checkpoints" / "4", "4': is no checkpoint"),
        (lambda path: shutil.rmtree(path / "checkpoints") or path, "holds no checkpoint yet"),
        (lambda path: (path / "config.json").write_text("{") and path, "is not a config in JSON"),
    ],
)
def test_open_trained_model_says_what_a_folder_lacks(run, tmp_path, change, words):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    with pytest.raises(ConfigError, match=words):
        open_trained_model(str(change(copy)))
