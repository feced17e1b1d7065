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


def test_every_line_is_a_json_object_with_the_step_first(tmp_path):
    write(tmp_path, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0, "tokens": 1024}, {"step": 2, "loss": 0.5, "tokens": 2048}]
    assert list(lines[0]) == ["step", "loss", "tokens"]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None) as writer:
        writer.write(1, {"loss": jnp.float32(0.1)})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": float(jnp.float32(0.1))}]


def test_after_sync_a_line_would_survive_a_crash_and_tensorboard_shows_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None) as writer:
        writer.write(1, {"loss": 1.0})
        assert (synced, visible_scalars(tmp_path)) == ([], [])
        writer.sync()
        assert (tmp_path / "metrics.jsonl").stat().st_ino in synced
        assert visible_scalars(tmp_path) == [(1, "loss")]


def test_a_killed_and_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    write(whole, range(1, 9))
    write(killed, range(1, 7))
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # the process was killed while it wrote
    write(killed, range(5, 9), resume_step=4)
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_that_starts_over_keeps_no_line(tmp_path):
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


def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None) as writer:
        writer.write(1, {"loss": math.nan})
        writer.write(2, {"loss": math.inf})
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()
    assert all(math.isnan(line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_a_step_among_the_numbers_is_refused(tmp_path):
    with (
        MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", resume_step=None) as writer,
        pytest.raises(ValueError, match="step"),
    ):
        writer.write(1, {"step": 2})


def test_a_torn_last_line_is_left_out_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    path.write_text("")
    assert read_metrics(path) == read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1.0}', '{"step": "1"}', ""])
def test_a_damaged_line_inside_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: .* remove the line"):
        read_metrics(path)


def test_what_a_crash_of_the_machine_spoilt_is_dropped_when_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n\x00\x00\xff\x00\n\x00\x00')
    write(tmp_path, [2], resume_step=1)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_step_that_will_be_evaluated_again_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "loss": 2.0}\n{"step": 4, "heldout_loss": 2.5}\n')
    for evaluated, kept in ((True, 2), (False, 1)):
        MetricsWriter(path, tmp_path / "tensorboard", resume_step=4, evaluated=evaluated).close()
        assert len(read_metrics(path)) == kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_tensorboard_is_an_error_and_not_a_wait(tmp_path):
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
def test_a_file_that_vanishes_while_a_run_goes_on_ends_it_with_a_line_that_names_it(tmp_path, remove):
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


def test_files_that_cannot_be_opened_or_written_any_more_are_said_in_a_line(tmp_path, monkeypatch):
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
