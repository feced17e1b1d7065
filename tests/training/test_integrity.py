"""The files of a checkpoint are compared with what was written before orbax opens any of them."""

import errno
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.fault_tolerance.integrity import (
    MANIFEST,
    DamagedError,
    fingerprints,
    read_contents,
    require_written,
    sign,
    write_manifest,
)

STATE = {"w": jnp.arange(300, dtype=jnp.float32), "step": jnp.int32(7)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a run's checkpoints, as `Checkpoints` leaves it."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(path) as checkpoints:
        checkpoints.save(1, STATE, {"row": 3})
    return path


@pytest.fixture
def checkpoint(written, tmp_path):
    """The folder of a copy of a checkpoint."""
    return shutil.copytree(written, tmp_path / "checkpoints") / "1"


def files_below(folder):
    return sorted(path for path in (folder / "state").rglob("*") if path.is_file())


def restore(checkpoint):
    with Checkpoints(checkpoint.parent) as checkpoints:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)
        return checkpoints.restore_newest(abstract, warn=print)


def test_manifest_lists_every_file_of_the_state(checkpoint):
    contents = read_contents(checkpoint)
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert sorted(listed) == [os.path.relpath(path, checkpoint) for path in files_below(checkpoint)]
    assert len(listed) >= 4
    assert {name: size for name, (size, _) in listed.items()} == {
        name: os.path.getsize(checkpoint / name) for name in listed
    }
    require_written(checkpoint, contents)
    assert restore(checkpoint).data == {"row": 3}


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "remove", "pipe", "folder", "endless", "broken link"])
def test_require_written_names_each_damaged_file(checkpoint, damage):
    contents = read_contents(checkpoint)
    for path in files_below(checkpoint):
        kept = path.rename(checkpoint / "kept")
        raw = kept.read_bytes()
        match damage:
            case "flip":
                path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
            case "cut":
                path.write_bytes(raw[:-1])
            case "longer":
                path.write_bytes(raw + b"\0")
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "endless":
                path.symlink_to("/dev/zero")
            case "broken link":
                path.symlink_to("nowhere")
        words = f"1 is damaged: '{os.path.relpath(path, checkpoint)}' is not as it was written"
        with pytest.raises(DamagedError, match=re.escape(words)):
            require_written(checkpoint, contents)
        if damage == "folder":
            path.rmdir()
        kept.rename(path)
        require_written(checkpoint, contents)


def test_restore_does_not_ask_orbax_for_damaged_files(checkpoint, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("orbax was asked")

    for name in ("restore", "item_metadata"):
        monkeypatch.setattr(ocp.CheckpointManager, name, never)
    path = files_below(checkpoint)[0]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RunError, match="1 is damaged: .* is not as it was written, and none of the checkpoints"):
        restore(checkpoint)


@pytest.mark.parametrize("change", ["gone", "cut", "edited", "no object", "empty"])
def test_manifest_that_was_changed_is_damage(checkpoint, change):
    path = checkpoint / MANIFEST
    text = path.read_text()
    match change:
        case "gone":
            path.unlink()
        case "cut":
            path.write_text(text[:-9])
        case "edited":
            path.write_text(json.dumps(json.loads(text) | {"files": {}}))
        case "no object":
            path.write_text("[]")
        case "empty":
            path.write_text("")
    with pytest.raises(DamagedError, match=f"1 is damaged: {MANIFEST} is not as it was written"):
        require_written(checkpoint, read_contents(checkpoint))


@pytest.mark.parametrize("files", [[], None, {"../1/files.json": [1, "x"]}, {"state/manifest.ocdbt": 7}, {"": []}])
def test_manifest_that_names_other_files_is_damage(checkpoint, files):
    (checkpoint / MANIFEST).write_text(json.dumps(sign({"files": files})))
    with pytest.raises(DamagedError, match="1 is damaged: "):
        require_written(checkpoint, read_contents(checkpoint))


def test_checkpoint_without_a_manifest_is_read(checkpoint):
    (checkpoint / MANIFEST).unlink()
    contents = read_contents(checkpoint)
    del contents["files"]
    (checkpoint / "data" / "metadata").write_text(json.dumps(sign(contents)))
    assert restore(checkpoint).data == {"row": 3}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_file_system_that_is_away_is_not_damage(checkpoint, monkeypatch, number):
    def away(*_args):
        raise OSError(number, os.strerror(number))

    contents = read_contents(checkpoint)
    monkeypatch.setattr("ring_attention.training.fault_tolerance.integrity.os.stat", away)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        require_written(checkpoint, contents)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        read_contents(checkpoint)


def test_require_written_shares_files_among_processes(checkpoint):
    write_manifest(checkpoint)
    contents = read_contents(checkpoint)
    for path in files_below(checkpoint):
        raw = path.read_bytes()
        path.write_bytes(raw + b"\0")
        found = 0
        for part in range(3):
            try:
                require_written(checkpoint, contents, part, 3)
            except DamagedError:
                found += 1
        assert found == 1
        path.write_bytes(raw)


DTYPES = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.bool_]


def some(dtype, seed=0, shape=(16, 24)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2, shape), dtype)


def flipped(x, place):
    """`x` with the lowest bit of one element flipped."""
    x = np.asarray(x).copy()
    x.view(np.uint8).reshape(*x.shape, x.dtype.itemsize)[(*place, 0)] ^= 1
    return jnp.asarray(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_changes_with_any_flipped_bit(dtype):
    x = some(dtype)
    random = np.random.default_rng(1)
    for _ in range(5):
        place = random.integers(0, 16), random.integers(0, 24)
        assert fingerprints({"x": x}) != fingerprints({"x": flipped(x, place)})


def test_fingerprint_changes_with_paired_changes_and_swaps():
    x = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    negated, swapped = x.copy(), x.copy()
    negated[2:6] *= -1
    swapped[[1, 3]] = x[[3, 1]]
    assert len({fingerprints({"x": jnp.asarray(each)})["x"] for each in (x, negated, swapped, x.T)}) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_does_not_depend_on_sharding(dtype):
    x = some(dtype)
    meshes = [Mesh(np.array(jax.devices()[:2]), ("a",)), Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))]
    placed = [x, *(jax.device_put(x, NamedSharding(mesh, P("a", *mesh.axis_names[1:]))) for mesh in meshes)]
    assert len({fingerprints({"x": each})["x"] for each in placed}) == 1


def test_fingerprints_are_named_by_path_and_cover_random_keys():
    names = fingerprints({"params": {"w": jnp.ones(3)}, "keys": (jax.random.key(1), jax.random.key(2))})
    assert sorted(names) == ["keys.0", "keys.1", "params.w"]
    assert names["keys.0"] != names["keys.1"]
