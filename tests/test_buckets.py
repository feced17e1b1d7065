"""The address of a bucket in the place of a path: refused in a line, and no folder called gs: is made."""

import argparse
import ast
import dataclasses
from pathlib import Path

import pytest

from ring_attention.checks import ConfigError, local_path, require_local
from ring_attention.data.config import DataConfig
from ring_attention.evaluation.model_source import output_folder
from ring_attention.models.config import ModelConfig
from ring_attention.training.config import TrainConfig
from ring_attention.training.flags import load_config
from ring_attention.training.hf_conversion import new_folder
from ring_attention.training.trained_model import open_trained_model

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(vocab_size=264, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64)
CONFIG = TrainConfig(name="tiny", model=MODEL, seq_len=512, num_steps=200)
BUCKET = "gs://bucket/run"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == [], "something was made"


def make_new_folder(path):
    with new_folder(Path(path), 1, "--out"):
        pytest.fail("went on to write")


TAKERS = {
    "run_dir": lambda path: dataclasses.replace(CONFIG, run_dir=path),
    "name": lambda path: dataclasses.replace(CONFIG, name=path),
    "init_from": lambda path: dataclasses.replace(CONFIG, init_from=path),
    "data.paths": lambda path: DataConfig(paths=f"texts/*.txt, {path}/*.txt"),
    "data.tokenizer": lambda path: DataConfig(tokenizer=path),
    "checkpoint": open_trained_model,
    "--config": load_config,
    "--out": make_new_folder,
    "out": lambda path: output_folder("runs/a", path),
}


@pytest.mark.parametrize("field", TAKERS)
@pytest.mark.parametrize("path", [BUCKET, "s3://bucket", "hdfs://host:9000/a", "file:///a", "gs:/bucket"])
def test_every_field_that_takes_a_path_refuses_the_address_of_a_bucket_and_says_what_to_do(field, path):
    with pytest.raises(ConfigError) as error:
        TAKERS[field](path)
    message = str(error.value)
    assert message.startswith(f"{field}=")
    assert f"begins with {path.partition('/')[0] + '/'!r} and is no path of this machine" in message
    assert "mount it (gcsfuse, mount-s3) or copy it here" in message
    assert "\n" not in message


@pytest.mark.parametrize("path", ["runs/a", "/a/b:c", "C:/texts", "./gs:/odd", "a:b", "", "gs", "~/x"])
def test_paths_are_paths(path):
    require_local("run_dir", path)
    assert local_path(path) == Path(path)


def test_scripts_take_their_paths_through_the_same_check():
    with pytest.raises(argparse.ArgumentTypeError, match="^'gs://bucket/run': begins with 'gs:/' and is no path"):
        local_path(BUCKET)
    unchecked = []
    for file in [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("ring_attention/commands/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "type" and ast.unparse(node.value) == "Path":
                unchecked.append(file.name)
    assert unchecked == []
