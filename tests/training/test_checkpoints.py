import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_attention.checks import ConfigError
from ring_attention.training.checkpoints import KEEP, Checkpoints, abstract_like


@pytest.fixture(scope="module")
def ring():
    return Mesh(np.array(jax.devices()), ("sp",))


def make_state(mesh, seed=0):
    """Parameters, optimizer, step and random key, with the shardings a run has."""
    w, b = jax.random.split(jax.random.key(seed))
    params = {
        "w": jax.device_put(jax.random.normal(w, (16, 6)), NamedSharding(mesh, P("sp"))),
        "b": jax.device_put(jax.random.normal(b, (6,), jnp.bfloat16), NamedSharding(mesh, P())),
    }
    replicated = NamedSharding(mesh, P())
    others = jax.device_put({"step": jnp.int32(7), "key": jax.random.key(3)}, replicated)
    moments = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, replicated), optax.adamw(1e-3).init(params))
    return {"params": params, "optimizer": moments, **others}


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_state_and_its_data_position_come_back_bit_for_bit(tmp_path, ring):
    state, data = make_state(ring), {"epoch": 2, "cursor": [5, 12], "order": "hash"}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state, data)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 7
        restored, restored_data = checkpoints.restore(7, abstract_like(state))
    assert_same_bits(restored, state)
    assert restored["params"]["w"].sharding == state["params"]["w"].sharding
    assert restored_data == data
    with pytest.raises(AssertionError):
        assert_same_bits(restored, make_state(ring, seed=1))


def test_a_state_comes_back_on_the_shardings_of_another_mesh(tmp_path, ring):
    state = make_state(ring)
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("fsdp", "tp"))

    def elsewhere(x):
        spec = P("fsdp", "tp") if x.ndim == 2 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, jax.tree.map(elsewhere, state))
    assert_same_bits(restored, state)
    assert restored["params"]["w"].sharding == NamedSharding(mesh, P("fsdp", "tp"))
    assert restored["params"]["w"].addressable_shards[0].data.shape == (8, 2)


def test_buffers_that_are_donated_right_after_save_do_not_change_the_checkpoint(tmp_path, ring):
    state = {"w": jax.device_put(jnp.arange(2.0**20).reshape(1024, 1024), NamedSharding(ring, P("sp")))}
    want = jax.tree.map(np.array, state)
    abstract = abstract_like(state)
    update = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(4):
            state = update(state)
        restored, _ = checkpoints.restore(1, abstract)
    assert_same_bits(restored, want)
    assert not np.array_equal(state["w"], want["w"])


def test_save_returns_before_the_checkpoint_is_on_disk(tmp_path, ring, monkeypatch):
    release, commit = threading.Event(), ocp.AsyncCheckpointer._make_on_commit_callback

    def held_back(self, *args, **kwargs):
        callback = commit(self, *args, **kwargs)
        return lambda: (release.wait(20), callback())

    monkeypatch.setattr(ocp.AsyncCheckpointer, "_make_on_commit_callback", held_back)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(ring), {})
        before = (tmp_path / "1").exists()
        release.set()
        checkpoints.wait()
        assert (before, (tmp_path / "1").exists()) == (False, True)


def test_only_the_newest_checkpoints_are_kept(tmp_path, ring):
    state = make_state(ring)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, KEEP + 3):
            checkpoints.save(10 * step, state, {"step": step})
        checkpoints.wait()
        assert sorted(int(file.name) for file in tmp_path.iterdir()) == [30, 40, 50]
        assert checkpoints.restore(30, abstract_like(state))[1] == {"step": 3}


def test_a_folder_without_checkpoints_has_no_latest_step(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step() is None


def test_a_checkpoint_that_was_cut_off_does_not_count(tmp_path, ring):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(ring), {})
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_a_step_that_is_not_newer_is_refused(tmp_path, ring):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(ring), {})
        for step in (1, 2):
            with pytest.raises(ValueError, match=f"step={step} is not newer than the latest checkpoint, 2"):
                checkpoints.save(step, make_state(ring), {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("shape", "params.b is bfloat16[6], this run needs bfloat16[9]"),
        ("dtype", "params.b is bfloat16[6], this run needs float32[6]"),
        ("extra", "extra is absent, this run needs int32[]"),
        ("missing", "step is int32[], this run needs absent"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_one_line(tmp_path, ring, change, words):
    state = make_state(ring)
    abstract = abstract_like(state)
    scalar = abstract["step"]
    if change == "extra":
        abstract["extra"] = scalar
    elif change == "missing":
        del abstract["step"]
    else:
        shape, dtype = ((9,), jnp.bfloat16) if change == "shape" else ((6,), jnp.float32)
        abstract["params"]["b"] = jax.ShapeDtypeStruct(shape, dtype, sharding=scalar.sharding)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(ConfigError) as error:
            checkpoints.restore(1, abstract)
    assert str(error.value).startswith(f"{tmp_path}/1: {words}; ")
    assert "\n" not in str(error.value)


def test_a_step_that_is_not_there_is_refused(tmp_path, ring):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(ring), {})
        with pytest.raises(ValueError, match=r"step=2 has no checkpoint .* choose one of \[1\]"):
            checkpoints.restore(2, abstract_like(make_state(ring)))


def test_nothing_is_said_on_the_terminal(tmp_path, ring, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(ring), {})
        checkpoints.restore(1, abstract_like(make_state(ring)))
    assert capfd.readouterr() == ("", "")
