import dataclasses
import json

import pytest

from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import config_from_dict
from ring_attention.training.run_folder import open_run_folder

MODEL = ModelConfig(vocab_size=264, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64)
CONFIG = TrainConfig(name="tiny", model=MODEL, seq_len=512, num_steps=200)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(config):
    with pytest.raises(ConfigError) as error:
        open_run_folder(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_config_json_holds_the_resolved_config_and_nothing_else_is_left():
    folder = open_run_folder(CONFIG)
    assert config_from_dict(json.loads(folder.config.read_text())) == CONFIG
    assert [file.name for file in folder.path.iterdir()] == ["config.json"]


def test_the_folder_is_run_dir_or_runs_and_the_name(tmp_path):
    assert open_run_folder(CONFIG).path.resolve() == tmp_path / "runs" / "tiny"
    elsewhere = str(tmp_path / "a" / "b")
    assert str(open_run_folder(dataclasses.replace(CONFIG, run_dir=elsewhere)).path) == elsewhere


def test_a_changed_field_is_refused_with_both_values_and_the_remedies():
    open_run_folder(CONFIG)
    message = refusal(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, num_layers=4)))
    for words in ["model.num_layers=4", "with 2", "--config.model.num_layers=2", "--config.run_dir="]:
        assert words in message


def test_every_field_but_the_free_ones_is_refused():
    open_run_folder(CONFIG)
    for change in [{"seed": 1}, {"num_steps": 201}, {"batch_size": 2}, {"eval_sequences": 9}, {"seq_len": 1024}]:
        assert next(iter(change)) in refusal(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize("field", ["log_every", "eval_every", "checkpoint_every"])
def test_how_often_to_look_may_change_between_resumes(field):
    open_run_folder(CONFIG)
    folder = open_run_folder(dataclasses.replace(CONFIG, **{field: 7}))
    assert json.loads(folder.config.read_text())[field] == 7


def test_a_run_may_be_renamed_and_moved():
    folder = open_run_folder(CONFIG)
    folder.path.rename("moved")
    assert open_run_folder(dataclasses.replace(CONFIG, name="new", run_dir="moved")).config.exists()


def test_a_stored_field_that_no_longer_exists_is_refused_by_name():
    folder = open_run_folder(CONFIG)
    stored = json.loads(folder.config.read_text())
    stored["model"]["window"] = 64
    folder.config.write_text(json.dumps(stored))
    message = refusal(CONFIG)
    assert "model.window" in message
    assert "64" in message
    assert "--config.model.window" not in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_config_json_is_refused_by_its_path(text):
    folder = open_run_folder(CONFIG)
    folder.config.write_text(text)
    assert "runs/tiny/config.json" in refusal(CONFIG)


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in ["file", "file/below", "/proc/run"]:
        message = refusal(dataclasses.replace(CONFIG, run_dir=run_dir))
        assert f"run_dir='{run_dir}'" in message
        assert "--config.run_dir=PATH" in message
