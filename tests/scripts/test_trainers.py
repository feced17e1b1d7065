"""What the trainers that are compared begin with, and how they live in processes of their own."""

import dataclasses

import numpy as np
import pytest

from ring_attention.training.config import DataConfig, MeshConfig
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.flags import load_config
from scripts.benchmarks.trainer_process import TrainerProcess
from scripts.benchmarks.trainers import OURS, make_rows, write_text


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts").mkdir()
    write_text(tmp_path / "texts", 256, 6)
    data = DataConfig(paths=f"{tmp_path}/texts/*.txt", holdout_fraction=0.3)
    config = load_config("configs/tiny.py")
    return dataclasses.replace(config, mesh=MeshConfig(sp=2), batch_size=1, data=data)


def test_make_rows_gives_one_document_a_row(config, tmp_path):
    rows = make_rows(config)
    first = next(rows)
    assert (first.shape, first.dtype) == ((1, 256), np.int64)
    texts = {path.read_text() for path in (tmp_path / "texts").iterdir()}
    assert bytes(first[0, 1:].astype(np.uint8)).decode() in texts
    assert not np.array_equal(first, next(rows))


def test_make_rows_refuses_documents_that_do_not_fill_rows(config):
    with pytest.raises(ValueError, match="a row is not one document from its beginning"):
        next(make_rows(dataclasses.replace(config, seq_len=320)))


@pytest.mark.slow
def test_trainer_process_takes_steps_and_writes_weights(config, tmp_path):
    with TrainerProcess(OURS, config, tmp_path / "weights") as trainer:
        first, second = trainer.step(), trainer.step()
    assert first.loss != second.loss
    assert min(first.seconds, first.cpu_seconds) > 0
    assert (tmp_path / "weights" / "model.safetensors").stat().st_size > 1e5


def test_trainer_process_tells_what_went_wrong(config, tmp_path):
    (tmp_path / "weights").mkdir()
    with pytest.raises(RunError, match=r"(?s)^ours: .*FileExistsError"):
        TrainerProcess(OURS, config, tmp_path / "weights")
