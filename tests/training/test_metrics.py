import errno
import json
import math
import os
import shutil
import struct
from pathlib import Path

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.metrics import MetricsWriter, read_metrics


def write(folder, steps, *, resume_step=None):
    with MetricsWriter(folder / "metrics.jsonl", folder / "tensorboard", resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step, "tokens": step * 1024})


def visible_scalars(folder):
    """(step, name) of the scalars that TensorBoard shows: it hides what a later START event purges."""
    shown = []
    for file in sorted((folder / "tensorboard").iterdir(), key=lambda file: file.name.split(".")[3]):
        content = file.read_bytes()
        while content:  # records of TFRecord: length, checksum of it, event, checksum of it
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.session_log.status == event.session_log.START:
                shown = [(step, name) for step, name in shown if step < event.step]
            shown += [(event.step, value.tag) for value in event.summary.value]
    return shown


def test_metrics_line_is_a_json_object_with_the_step_first(tmp_path):
    write(tmp_path, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0, "tokens": 1024}, {"step": 2, "loss": 0.5, "tokens": 2048}]
    assert list(lines[0]) == ["step", "loss", "tokens"]


def test_metrics_line_is_on_disk_as_soon_as_written(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None) as writer:
        writer.write(1, {"loss": jnp.float32(0.1)})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": float(jnp.float32(0.1))}]


def test_metrics_sync_makes_lines_survive_a_crash(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None) as writer:
        writer.write(1, {"loss": 1.0})
        assert (synced, visible_scalars(tmp_path)) == ([], [])
        writer.sync()
        assert (tmp_path / "metrics.jsonl").stat().st_ino in synced
        assert visible_scalars(tmp_path) == [(1, "loss")]


def test_metrics_of_a_resumed_run_equal_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    write(whole, range(1, 9))
    write(killed, range(1, 7))
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # the process was killed while it wrote
    write(killed, range(5, 9), resume_step=4)
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_metrics_of_a_run_that_starts_over_are_new(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [1], resume_step=None)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3, 4])
    assert visible_scalars(tmp_path)[-1] == (4, "tokens")
    # Event files are named by the second they are made in.
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: 4e9)
    write(tmp_path, [3, 4], resume_step=2)
    assert visible_scalars(tmp_path) == [(step, name) for step in [1, 2, 3, 4] for name in ["loss", "tokens"]]


def test_metrics_write_null_for_what_is_not_finite(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None) as writer:
        writer.write(1, {"loss": math.nan})
        writer.write(2, {"loss": math.inf})
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()
    assert all(math.isnan(line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_metrics_write_refuses_a_step_among_the_numbers(tmp_path):
    with (
        MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None) as writer,
        pytest.raises(ValueError, match="step"),
    ):
        writer.write(1, {"step": 2})


def test_read_metrics_leaves_a_torn_last_line_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    path.write_text("")
    assert read_metrics(path) == read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1.0}', '{"step": "1"}', ""])
def test_read_metrics_refuses_a_damaged_line_by_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: .* remove the line"):
        read_metrics(path)


def test_metrics_drop_what_a_crash_spoilt_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n\x00\x00\xff\x00\n\x00\x00')
    write(tmp_path, [2], resume_step=1)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_metrics_count_a_step_evaluated_again_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "loss": 2.0}\n{"step": 4, "heldout_loss": 2.5}\n')
    for evaluated, kept in ((True, 2), (False, 1)):
        MetricsWriter(path, tmp_path / "tensorboard", resume_step=4, evaluated=evaluated).close()
        assert len(read_metrics(path)) == kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_tensorboard_on_a_full_disk_fails_and_does_not_wait(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None)
    file = writer._tensorboard._events._py_recordio_writer
    with open("/dev/full", "wb", buffering=0) as full:
        whole, file._writer = file._writer, full
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            fill(writer)
        file._writer = whole
    writer.close()


def fill(writer):
    for step in range(10_000):
        writer.write(step, {"loss": 1.0})


VANISHED = {
    "metrics.jsonl": lambda folder: (folder / "metrics.jsonl").unlink(),
    "metrics.jsonl of another run": lambda folder: (
        shutil.copy(folder / "metrics.jsonl", folder / "new") and (folder / "new").replace(folder / "metrics.jsonl")
    ),
    "tensorboard": lambda folder: shutil.rmtree(folder / "tensorboard"),
    "events": lambda folder: [file.unlink() for file in (folder / "tensorboard").iterdir()],
    "the whole folder": shutil.rmtree,
}


@pytest.mark.parametrize("remove", VANISHED.values(), ids=VANISHED)
def test_metrics_file_that_vanishes_is_named(tmp_path, remove):
    folder = tmp_path / "run"
    folder.mkdir()
    writer = MetricsWriter(folder / "metrics.jsonl", folder / "tensorboard", resume_step=None)
    writer.write(1, {"loss": 1.0})
    writer.sync()
    remove(folder)

    def go_on():
        writer.write(2, {"loss": 1.0})
        writer.sync()

    with pytest.raises(RunError) as error:
        go_on()
    writer.close()
    assert str(error.value).startswith(str(folder))
    assert "while the run goes on; leave its folder alone" in str(error.value)
    assert "\n" not in str(error.value)


def test_metrics_that_cannot_be_written_give_one_line(tmp_path, monkeypatch):
    (tmp_path / "tensorboard").write_text("no folder")
    with pytest.raises(RunError, match=rf"^{tmp_path}/tensorboard can no longer be written \(File exists\); mend it"):
        MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None)
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "events", resume_step=None) as writer:

        def stale(file):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        monkeypatch.setattr(os, "fsync", stale)
        with pytest.raises(RunError, match=rf"metrics.jsonl can no longer be written \({os.strerror(errno.ESTALE)}\)"):
            writer.sync()
        monkeypatch.undo()
