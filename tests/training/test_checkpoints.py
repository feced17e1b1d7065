import errno
import json
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_attention.checks import ConfigError
from ring_attention.training.checkpoints import DAMAGED, KEEP, Checkpoints
from ring_attention.training.fault_tolerance.errors import RunError


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


def abstract_like(state):
    """`state`'s shapes, dtypes and shardings, without its values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_checkpoint_gives_state_and_position_back_bitwise(tmp_path, ring):
    state, data = make_state(ring), {"epoch": 2, "cursor": [5, 12], "order": "hash"}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state, data)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 7
        _, restored, restored_data = checkpoints.restore(7, abstract_like(state))
    assert_same_bits(restored, state)
    assert restored["params"]["w"].sharding == state["params"]["w"].sharding
    assert restored_data == data
    with pytest.raises(AssertionError):
        assert_same_bits(restored, make_state(ring, seed=1))


def test_checkpoint_restores_on_another_mesh(tmp_path, ring):
    state = make_state(ring)
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("fsdp", "tp"))

    def elsewhere(x):
        spec = P("fsdp", "tp") if x.ndim == 2 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        _, restored, _ = checkpoints.restore(1, jax.tree.map(elsewhere, state))
    assert_same_bits(restored, state)
    assert restored["params"]["w"].sharding == NamedSharding(mesh, P("fsdp", "tp"))
    assert restored["params"]["w"].addressable_shards[0].data.shape == (8, 2)


def test_save_is_unchanged_by_buffers_donated_after_it(tmp_path, ring):
    state = {"w": jax.device_put(jnp.arange(2.0**20).reshape(1024, 1024), NamedSharding(ring, P("sp")))}
    want = jax.tree.map(np.array, state)
    abstract = abstract_like(state)
    update = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(4):
            state = update(state)
        _, restored, _ = checkpoints.restore(1, abstract)
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


def test_checkpoints_keeps_only_the_newest(tmp_path, ring):
    state = make_state(ring)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, KEEP + 3):
            checkpoints.save(10 * step, state, {"step": step})
        checkpoints.wait()
        assert sorted(int(file.name) for file in tmp_path.iterdir()) == [30, 40, 50]
        assert checkpoints.restore(30, abstract_like(state)).data == {"step": 3}


def test_latest_step_is_none_without_checkpoints(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step() is None


def test_checkpoint_that_was_cut_off_does_not_count(tmp_path, ring):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(ring), {})
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert [file.name for file in tmp_path.iterdir()] == ["1"], "its room is needed"


def test_save_refuses_a_step_that_is_not_newer(tmp_path, ring):
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
def test_restore_refuses_a_state_that_does_not_fit_in_one_line(tmp_path, ring, change, words):
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


def test_restore_refuses_a_step_that_is_not_there(tmp_path, ring):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(ring), {})
        with pytest.raises(ValueError, match=r"step=2 has no checkpoint .* choose one of \[1\]"):
            checkpoints.restore(2, abstract_like(make_state(ring)))


def test_checkpoints_print_nothing(tmp_path, ring, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(ring), {})
        checkpoints.restore(1, abstract_like(make_state(ring)))
    assert capfd.readouterr() == ("", "")


def three_checkpoints(folder, ring):
    """Checkpoints of steps 1, 2 and 3, each of another state; returns the states."""
    states = {step: make_state(ring, seed=step) for step in (1, 2, 3)}
    with Checkpoints(folder) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"row": 10 * step})
    return states


def restore_newest(folder, state):
    """(what came back, the warnings)."""
    warnings = []
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_newest(abstract_like(state), warn=warnings.append), warnings


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)


def change_a_stored_number(folder, state):
    """Store the newest state with one bit of one weight flipped, and the fingerprints of the state as it was."""
    bits = np.asarray(state["params"]["w"]).view(np.uint32).copy()
    bits[3, 2] ^= 1
    weights = jax.device_put(bits.view(np.float32), state["params"]["w"].sharding)
    contents = next(file for file in files_of(folder / "3") if b"fingerprints" in file.read_bytes())
    text = contents.read_text()
    with Checkpoints(folder) as checkpoints:
        checkpoints._manager.delete(3)
        checkpoints.save(3, state | {"params": state["params"] | {"w": weights}}, {"row": 30})
    contents.write_text(text)


def test_restore_newest_gives_the_newest_without_a_word(tmp_path, ring):
    states = three_checkpoints(tmp_path / "checkpoints", ring)
    restored, warnings = restore_newest(tmp_path / "checkpoints", states[3])
    assert (restored.step, restored.data, warnings) == (3, {"row": 30}, [])
    assert_same_bits(restored.state, states[3])


def test_restore_newest_names_flipped_bit_and_takes_older(tmp_path, ring):
    folder = tmp_path / "checkpoints"
    states = three_checkpoints(folder, ring)
    change_a_stored_number(folder, states[3])
    restored, (warning,) = restore_newest(folder, states[3])
    assert (restored.step, restored.data) == (2, {"row": 20})
    assert_same_bits(restored.state, states[2])
    assert f"{folder}/3 is damaged: params.w changed since it was written; moved to {tmp_path}/{DAMAGED}/3-" in warning
    (aside,) = (tmp_path / DAMAGED).iterdir()
    assert files_of(aside)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, states[3], {"row": 30})
    assert restore_newest(folder, states[3])[0].step == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_restore_newest_survives_damage_to_any_file(tmp_path, ring, damage):
    folder = tmp_path / "checkpoints"
    states = three_checkpoints(folder, ring)
    used = []
    for file in files_of(folder / "3"):
        contents = file.read_bytes()
        if damage == "remove":
            file.unlink()
        elif damage == "truncate":
            file.write_bytes(contents[: len(contents) // 2])
        else:
            file.write_bytes(bytes(byte ^ 0x55 for byte in contents[:64]) + contents[64:])
        restored, warnings = restore_newest(folder, states[3])
        assert_same_bits(restored.state, states[restored.step])
        assert restored.data == {"row": 10 * restored.step}
        assert len(warnings) == (restored.step == 2)
        used.append(restored.step)
        if restored.step == 2:
            (aside,) = (tmp_path / DAMAGED).iterdir()
            aside.rename(folder / "3")
        file.write_bytes(contents)
    assert used.count(2) >= 4, "of a file that no one needs the loss does not matter, of these it does"


def test_restore_newest_moves_nothing_where_none_is_whole(tmp_path, ring):
    folder = tmp_path / "checkpoints"
    states = three_checkpoints(folder, ring)
    for step in (1, 2, 3):
        for file in files_of(folder / str(step)):
            file.write_bytes(file.read_bytes()[:3])
    with pytest.raises(RunError, match=r"3 is damaged: .*none of the checkpoints \[1, 2, 3\] is whole; put a copy"):
        restore_newest(folder, states[3])
    assert sorted(file.name for file in folder.iterdir()) == ["1", "2", "3"]


def test_restore_notices_an_edited_data_position(tmp_path, ring):
    folder = tmp_path / "checkpoints"
    states = three_checkpoints(folder, ring)
    contents = next(file for file in files_of(folder / "3") if b"fingerprints" in file.read_bytes())
    values = json.loads(contents.read_text())
    values["data"]["row"] = 31
    contents.write_text(json.dumps(values))
    restored, (warning,) = restore_newest(folder, states[3])
    assert restored.step == 2
    assert "the position in the data is not as it was written" in warning


def test_save_after_going_back_takes_the_newer_step_again(tmp_path, ring):
    folder = tmp_path / "checkpoints"
    states = three_checkpoints(folder, ring)
    contents = next(file for file in files_of(folder / "3") if b"fingerprints" in file.read_bytes())
    contents.write_text(contents.read_text().replace('"row": 30', '"row": 31').replace('"row":30', '"row":31'))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_newest(abstract_like(states[3]), warn=lambda line: None).step == 2
        assert checkpoints.latest_step() == 2
        checkpoints.save(3, states[3], {"row": 30})
    restored, warnings = restore_newest(folder, states[3])
    assert (restored.step, restored.data, warnings) == (3, {"row": 30}, [])


def save_others(folder, states, steps):
    """Store checkpoints of these steps, of a state that has an array more than the run needs."""
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            extra = {"extra": states[step]["step"]} if step in steps else {}
            checkpoints.save(step, states[step] | extra, {"row": 10 * step})


@pytest.fixture
def three_states(ring):
    return {step: make_state(ring, seed=step) for step in (1, 2, 3)}


def test_restore_newest_takes_older_where_arrays_do_not_fit(tmp_path, three_states):
    folder = tmp_path / "checkpoints"
    save_others(folder, three_states, steps=[3])
    restored, (warning,) = restore_newest(folder, three_states[3])
    assert restored.step == 2
    assert f"{folder}/3: extra is int32[], this run needs absent" in warning
    assert f"moved to {tmp_path}/{DAMAGED}/3-" in warning


def test_restore_newest_blames_config_where_no_arrays_fit(tmp_path, three_states):
    folder = tmp_path / "checkpoints"
    save_others(folder, three_states, steps=[1, 2, 3])
    with pytest.raises(ConfigError, match="3: extra is .*go on with the model and optimizer that wrote it"):
        restore_newest(folder, three_states[3])
    assert sorted(file.name for file in folder.iterdir()) == ["1", "2", "3"]


def test_restore_newest_blames_damage_before_unfit_ones(tmp_path, three_states):
    folder = tmp_path / "checkpoints"
    save_others(folder, three_states, steps=[1, 2])
    contents = next(file for file in files_of(folder / "3") if b"fingerprints" in file.read_bytes())
    contents.write_text(contents.read_text().replace("digest", "dijest"))
    with pytest.raises(RunError, match=r"3 is damaged: .*none of the checkpoints \[1, 2, 3\] is whole"):
        restore_newest(folder, three_states[3])
    assert sorted(file.name for file in folder.iterdir()) == ["1", "2", "3"]


def test_checkpoint_being_written_survives_an_error_of_the_run(tmp_path, ring, monkeypatch):
    commit = ocp.AsyncCheckpointer._make_on_commit_callback

    def slow(self, *args, **kwargs):
        callback = commit(self, *args, **kwargs)
        return lambda: (time.sleep(1), callback())

    monkeypatch.setattr(ocp.AsyncCheckpointer, "_make_on_commit_callback", slow)
    state = make_state(ring)

    def fail_while_writing():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, {})
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_writing()
    assert [file.name for file in tmp_path.iterdir()] == ["1"]


def test_save_on_full_disk_keeps_the_last_good_checkpoint(tmp_path, ring, monkeypatch):
    states = three_checkpoints(tmp_path, ring)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.AsyncCheckpointer, "_make_on_commit_callback", lambda *_args, **_kwargs: full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, states[3], {"row": 40})
    words = rf"the disk is full \(.* MiB free\); the last good one is {tmp_path}/3; make room"
    with pytest.raises(RunError, match=words):
        checkpoints.wait()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1", "2", "3"], "the room of the unfinished is needed"
    monkeypatch.undo()
    assert restore_newest(tmp_path, states[3])[0].step == 3


@pytest.mark.parametrize("moment", ["before a checkpoint", "while it is written"])
def test_save_does_not_remake_a_folder_that_vanished(tmp_path, ring, monkeypatch, moment):
    run, state = tmp_path / "run", make_state(ring)
    run.mkdir()
    checkpoints = Checkpoints(run / "checkpoints")
    if moment == "before a checkpoint":
        checkpoints.save(1, state, {})
        checkpoints.wait()
        shutil.rmtree(run)
    else:

        def vanish(*_args, **_kwargs):
            shutil.rmtree(run)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(run))

        monkeypatch.setattr(ocp.AsyncCheckpointer, "_make_on_commit_callback", lambda *_args, **_kwargs: vanish)
        checkpoints.save(1, state, {})
    go_on = checkpoints.wait if moment == "while it is written" else lambda: checkpoints.save(2, state, {})
    with pytest.raises(RunError, match=rf"^{run}/checkpoints was removed while the run goes on") as error:
        go_on()
    assert "\n" not in str(error.value)
    assert not run.exists()


def test_require_room_refuses_a_disk_too_small_for_checkpoints(tmp_path, ring):
    abstract = jax.eval_shape(lambda: {"w": jnp.zeros((2**20, 2**20, 2**10), jnp.float32)})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            ConfigError, match=r"run_dir=.* MiB free, and the run needs .* for 4 more checkpoints of .*;"
        ):
            checkpoints.require_room(abstract)
        checkpoints.require_room(abstract_like(make_state(ring)))


def test_restore_newest_does_not_start_over_beside_damaged(tmp_path, ring):
    folder = tmp_path / "checkpoints"
    (tmp_path / DAMAGED / "3").mkdir(parents=True)
    with pytest.raises(
        RunError, match=rf"{folder} holds no checkpoint, but {tmp_path}/{DAMAGED} holds damaged ones; put"
    ):
        restore_newest(folder, make_state(ring))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES])
def test_file_system_that_is_away_is_not_damage(tmp_path, ring, monkeypatch, number):
    states = three_checkpoints(tmp_path / "checkpoints", ring)

    def away(*_args, **_kwargs):
        raise ValueError(f"FAILED_PRECONDITION: reading failed [OS error {number}: {os.strerror(number)}]")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", away)
    with pytest.raises(RunError, match="3 cannot be read: .*; start the run again"):
        restore_newest(tmp_path / "checkpoints", states[3])
    assert not (tmp_path / DAMAGED).exists()


def test_processes_go_back_one_checkpoint_a_start_to_the_last(tmp_path, ring, monkeypatch):
    folder = tmp_path / "checkpoints"
    states = three_checkpoints(folder, ring)

    def broken(*_args, **_kwargs):
        raise ValueError("DATA_LOSS")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", broken)
    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for step in (3, 2):
        with pytest.raises(RunError, match=rf"{folder}/{step} is damaged: DATA_LOSS; moved to .*; start the run again"):
            checkpoints.restore_newest(abstract_like(states[3]), warn=print)
        checkpoints._manager.reload()
    for _ in range(2):
        with pytest.raises(RunError, match=rf"{folder}/1 is damaged: DATA_LOSS, and there is no other; put a copy"):
            checkpoints.restore_newest(abstract_like(states[3]), warn=print)
    assert [file.name for file in folder.iterdir()] == ["1"]


def test_set_aside_tolerates_another_process_doing_it_first(tmp_path, ring, monkeypatch):
    folder = tmp_path / "checkpoints"
    states = three_checkpoints(folder, ring)

    def broken_and_moved(*_args, **_kwargs):
        (folder / "3").rename(tmp_path / "moved")
        raise ValueError("DATA_LOSS")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", broken_and_moved)
    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RunError, match=rf"3 is damaged: DATA_LOSS; moved to {tmp_path}/{DAMAGED}; start the run again"):
        checkpoints.restore_newest(abstract_like(states[3]), warn=print)


def test_check_notices_a_failed_save_before_the_next(tmp_path, ring, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.AsyncCheckpointer, "_make_on_commit_callback", lambda *_args, **_kwargs: full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.check()
    checkpoints.save(1, make_state(ring), {})
    with pytest.raises(RunError, match=r"the disk is full \(.* MiB free\); there is none yet; make room"):
        until_noticed(checkpoints)


def until_noticed(checkpoints):
    for _ in range(200):
        checkpoints.check()
        time.sleep(0.1)
