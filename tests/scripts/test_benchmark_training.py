"""scripts/benchmarks/training.py runs, compares losses and writes what it prints."""

import json

import pytest
from command_lines import call_command, run_command

from ring_attention.training.fault_tolerance.errors import RunError
from scripts.benchmarks import training
from scripts.benchmarks.trainer_process import Step

TINY = [
    "--config.seq_len=128",
    "--config.model.num_layers=1",
    "--config.model.model_dim=32",
    "--config.model.ffn_dim=64",
]
TINY += ["--config.model.vocab_size=264", "--config.model.head_dim=16"]


@pytest.mark.slow
def test_benchmark_training_writes_tables_picture_and_numbers(tmp_path):
    done = run_command("benchmarks training", "--repeats=2", *TINY, f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "L=1 M=32 F=64 V=264 H=4 K=2 D=16" in done.stdout
    assert "Where a step's time goes: ours" in done.stdout
    values = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(values["steps"]["ours"]) == 2
    assert values["parts"]["ours"]["attention backward"] > 0
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark_training_refuses_what_cannot_be_compared(capsys):
    for flags, line in (
        (["--repeats=0"], "repeats=0: must be positive"),
        (["--config.mesh.tp=2"], "mesh, batch_size: a ring is compared, with one sequence a step; set only mesh.sp"),
        (["--config.batch_size=2"], "mesh, batch_size: "),
        (["--config.model.heads=2"], "model.heads"),
    ):
        assert call_command("training", training.main, *flags) == 2
        assert line in capsys.readouterr().err


class _Trainer:
    def __init__(self, kind, losses):
        self.kind, self._losses = kind, iter(losses)

    def step(self):
        return Step(seconds=1.0, cpu_seconds=1.0, loss=next(self._losses))


def test_take_turns_ends_where_losses_differ():
    steps = training.take_turns([_Trainer("ours", [4, 3, 2, 1]), _Trainer("other", [4.0001, 3, 2, 1])], 2, lambda: None)
    assert [step.loss for step in steps["ours"]] == [2, 1]
    with pytest.raises(RunError, match="other: the loss of step 1 is 3.010000, ours is 3.000000"):
        training.take_turns([_Trainer("ours", [4, 3, 2]), _Trainer("other", [4, 3.01, 2])], 1, lambda: None)
