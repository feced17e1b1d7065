import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.models.config import ModelConfig
from ring_attention.training.config import AttentionConfig, MeshConfig, TrainConfig
from ring_attention.training.config_values import config_from_dict, field_kinds, is_list
from ring_attention.training.fault_tolerance import disk
from ring_attention.training.fault_tolerance.disk import FolderLock
from ring_attention.training.run_folder import VERSION, read_config
from ring_attention.training.run_folder import open_run_folder as hold_run_folder

MODEL = ModelConfig(vocab_size=264, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64)
CONFIG = TrainConfig(name="tiny", model=MODEL, seq_len=512, num_steps=200)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def open_run_folder(config, say=lambda line: None):
    """Hold the folder for a moment."""
    with hold_run_folder(config, say=say) as folder:
        return folder


def refusal(config):
    with pytest.raises(ConfigError) as error:
        open_run_folder(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_run_folder_holds_the_resolved_config_alone():
    folder = open_run_folder(CONFIG)
    values = json.loads(folder.config.read_text())
    assert values.pop("version") == VERSION
    assert config_from_dict(values) == CONFIG
    assert sorted(file.name for file in folder.path.iterdir()) == [".lock", "config.json"]


def test_folder_of_is_run_dir_or_runs_and_the_name(tmp_path):
    assert open_run_folder(CONFIG).path.resolve() == tmp_path / "runs" / "tiny"
    elsewhere = str(tmp_path / "a" / "b")
    assert str(open_run_folder(dataclasses.replace(CONFIG, run_dir=elsewhere)).path) == elsewhere


def test_run_folder_refuses_a_changed_field_with_both_values():
    open_run_folder(CONFIG)
    message = refusal(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, num_layers=4)))
    for words in ["model.num_layers=4", "with 2", "--config.model.num_layers=2", "--config.run_dir="]:
        assert words in message


def test_run_folder_refuses_every_field_but_the_free():
    open_run_folder(CONFIG)
    for change in [{"seed": 1}, {"num_steps": 201}, {"batch_size": 2}, {"eval_sequences": 9}, {"seq_len": 1024}]:
        assert next(iter(change)) in refusal(dataclasses.replace(CONFIG, **change))


MAY_CHANGE = {
    *("name", "run_dir", "data.index_dir", "log_every", "eval_every", "checkpoint_every"),
    "optimizer.max_skipped_updates",
}
CHANGES_RESULTS = {
    f"attention.{name}"
    for name in ["stride", "window", "chunk", "max_segment_len", "softcap", "sinks", "alibi", "dropout_rate"]
}
CHANGES_ROUNDING = {
    *(field for field in field_kinds() if field.startswith(("mesh.", "attention."))),
    *("model.remat", "model.head_groups", "model.ffn_chunk", "model.loss_chunk", "optimizer.accumulation_steps"),
} - CHANGES_RESULTS
OTHER = {int: lambda x: x + 1, float: lambda x: x + 1, str: lambda x: x + "x", bool: lambda x: not x}


@pytest.mark.parametrize("field", field_kinds())
def test_run_folder_refuses_what_changes_results_alone(field):
    folder = open_run_folder(CONFIG)
    values = flatten_dict(json.loads(folder.config.read_text()), sep=".")
    if field in ("attention.strategy", "attention.local_strategy"):
        values[field] = "ulysses"
    elif is_list(field_kinds()[field]):
        values[field] = values[field] + values[field] + [{}]
    else:
        values[field] = OTHER[field_kinds()[field]](values[field])
    folder.config.write_text(json.dumps(unflatten_dict(values, sep=".")))
    if field not in MAY_CHANGE | CHANGES_ROUNDING:
        assert refusal(CONFIG).startswith(f"{field}=")
        return
    lines = []
    open_run_folder(CONFIG, say=lines.append)
    assert [line.partition(" was ")[0] for line in lines] == [field] * (field in CHANGES_ROUNDING)


@pytest.mark.parametrize("field", ["log_every", "eval_every", "checkpoint_every"])
def test_run_folder_lets_intervals_change(field):
    open_run_folder(CONFIG)
    folder = open_run_folder(dataclasses.replace(CONFIG, **{field: 7}))
    assert json.loads(folder.config.read_text())[field] == 7


def test_run_folder_may_be_renamed_and_moved():
    folder = open_run_folder(CONFIG)
    folder.path.rename("moved")
    assert open_run_folder(dataclasses.replace(CONFIG, name="new", run_dir="moved")).config.exists()


def test_run_folder_without_newer_fields_goes_on_as_before():
    folder = open_run_folder(CONFIG)
    stored = json.loads(folder.config.read_text())
    for field in ("train_on_end", "special_tokens"):
        del stored["data"][field]
    folder.config.write_text(json.dumps(stored))
    assert "data.train_on_end=True: " in refusal(CONFIG)
    assert "holds a run with False; go back with --config.data.train_on_end=false" in refusal(CONFIG)
    assert not read_config(folder).data.train_on_end
    open_run_folder(dataclasses.replace(CONFIG, data=DataConfig(train_on_end=False)))
    stored["data"] = 3
    folder.config.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="data=3: is a section"):
        read_config(folder)


def test_run_folder_refuses_an_unknown_stored_field_by_name():
    folder = open_run_folder(CONFIG)
    stored = json.loads(folder.config.read_text())
    stored["model"]["window"] = 64
    folder.config.write_text(json.dumps(stored))
    message = refusal(CONFIG)
    assert "model.window" in message
    assert "64" in message
    assert "--config.model.window" not in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_run_folder_refuses_a_damaged_config_json_by_path(text):
    folder = open_run_folder(CONFIG)
    folder.config.write_text(text)
    assert "runs/tiny/config.json" in refusal(CONFIG)


def test_run_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in ["file", "file/below", "/proc/run"]:
        message = refusal(dataclasses.replace(CONFIG, run_dir=run_dir))
        assert f"run_dir='{run_dir}'" in message
        assert "--config.run_dir=PATH" in message


def test_folder_lock_refuses_a_folder_in_use_by_owner():
    with hold_run_folder(CONFIG) as folder:
        message = refusal(CONFIG)
        assert f"run_dir='{folder.path}': is in use by process {os.getpid()} on {socket.gethostname()} since" in message
        assert "--config.run_dir=PATH" in message
        open_run_folder(dataclasses.replace(CONFIG, run_dir="another"))
    open_run_folder(CONFIG)


def test_folder_lock_of_a_killed_process_is_free():
    program = (
        "import os; from pathlib import Path\n"
        "from ring_attention.training.fault_tolerance.disk import FolderLock\n"
        "FolderLock(Path('.')); print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    path = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("held\n", -9)
    FolderLock(Path()).release()


def test_run_folder_refuses_a_newer_version():
    folder = open_run_folder(CONFIG)
    values = json.loads(folder.config.read_text())
    folder.config.write_text(json.dumps(values | {"version": VERSION + 1}))
    message = refusal(CONFIG)
    assert f"version={VERSION + 1}: runs/tiny/config.json was written by a newer train.py" in message
    assert "update ring_attention or" in message


def test_folder_lock_waits_for_another_machines_lease(monkeypatch):
    monkeypatch.setattr(disk, "LEASE_SECONDS", 3)
    with hold_run_folder(CONFIG) as folder:
        lock = folder.path / ".lock"
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "dead.example"}))
        begin = time.monotonic()
        assert "on dead.example since" in refusal(CONFIG)
        assert time.monotonic() - begin >= 3
        monkeypatch.setattr(disk, "LEASE_SECONDS", 60)
        waiting = threading.Thread(target=open_run_folder, args=(CONFIG,))
        waiting.start()
        time.sleep(1)
        assert waiting.is_alive()
    waiting.join(timeout=20)
    assert not waiting.is_alive()


def test_run_folder_refuses_a_run_without_a_version():
    folder = open_run_folder(CONFIG)
    values = json.loads(folder.config.read_text())
    del values["version"]
    folder.config.write_text(json.dumps(values))
    assert "was written by an older train.py" in refusal(CONFIG)


PLACEMENTS = [
    {"mesh": MeshConfig(fsdp=2, sp=4)},
    {"attention": AttentionConfig(layout="striped", block_q=64)},
    {"attention": AttentionConfig(strategy="ulysses")},
    {"model": dataclasses.replace(MODEL, loss_chunk=32)},
]


@pytest.mark.parametrize("change", PLACEMENTS, ids=["mesh", "layout", "strategy", "chunk"])
def test_run_folder_lets_placement_change_and_says_so(change):
    open_run_folder(CONFIG)
    lines = []
    open_run_folder(dataclasses.replace(CONFIG, **change), say=lines.append)
    assert lines
    assert all(line.endswith("the losses agree but for rounding.") for line in lines)
    assert next(iter(change)) in lines[0]


def test_run_folder_refuses_a_strategy_of_another_function():
    open_run_folder(CONFIG)
    sparse = dataclasses.replace(CONFIG, attention=AttentionConfig(strategy="sparse"))
    assert "attention.strategy='sparse'" in refusal(sparse)
    window = dataclasses.replace(CONFIG, attention=AttentionConfig(window=64))
    assert "attention.window=64" in refusal(window)
