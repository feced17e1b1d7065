import json
import subprocess
import sys

import pytest
from command_lines import REPOSITORY as ROOT
from command_lines import call_command
from small_tokenizers import write_tokenizer

from ring_attention.checks import ConfigError
from ring_attention.commands import train
from ring_attention.training import run as run_module
from ring_attention.training.metrics import TrainLog, read_metrics

TINY = "--config=configs/tiny.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The library's own documentation and source, which any checkout has."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in sorted(ROOT.glob("ring_attention/*/*.py")):
        (folder / f"{file.parent.name}_{file.name}").write_bytes(file.read_bytes() + b"\n")
    return f"--config.data.paths={folder}/*.py"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(corpus, folder, *flags):
    train.main([TINY, corpus, "--config.data.holdout_fraction=0.3", f"--config.run_dir={folder}", *flags])
    return losses(folder)


def losses(folder):
    """Every number of every step that does not depend on the clock, as written."""
    return [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("finished")
        return folder, run(corpus, folder)


@pytest.mark.slow
def test_train_goes_on_bitwise_after_an_interruption(corpus, finished, tmp_path, monkeypatch):
    def lose_power_at_step_7(log, step, *numbers):
        if step == 7:
            raise KeyboardInterrupt
        add(log, step, *numbers)

    add = TrainLog.add
    monkeypatch.setattr(TrainLog, "add", lose_power_at_step_7)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path)
    assert losses(tmp_path)[-1]["step"] < 12
    monkeypatch.setattr(TrainLog, "add", add)
    assert run(corpus, tmp_path) == finished[1]
    assert [line["step"] for line in finished[1] if "loss" in line] == list(range(1, 13))


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(finished):
    folder, lines = finished
    for name in ("config.json", "metrics.jsonl", "loss.png", "tensorboard", "checkpoints/12"):
        assert (folder / name).exists(), name
    assert json.loads((folder / "config.json").read_text())["model"]["num_layers"] == 2
    assert lines[0]["loss"] > lines[-2]["loss"] > 0


@pytest.mark.slow
def test_train_reports_a_finished_run_again(corpus, finished, capsys):
    folder, lines = finished
    assert run(corpus, folder) == lines
    screen = capsys.readouterr().out
    assert "simulating 8 devices on" in screen
    assert "byte model, order 2" in screen
    assert f"Run folder: {folder}" in screen
    assert "step 12/12" not in screen


@pytest.mark.slow
def test_train_refuses_texts_and_tokenizers_that_changed(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"the {number}th text says so. " * 40)
    write_tokenizer(tmp_path, ["<s>"])
    flags = [TINY, f"--config.data.paths={tmp_path}/texts/*.txt", f"--config.data.tokenizer={tmp_path}/tokenizer.json"]
    flags += ["--config.data.holdout_fraction=0.3", f"--config.run_dir={tmp_path}/run"]
    flags += [
        "--config.num_steps=2",
        "--config.optimizer.warmup_steps=1",
        "--config.eval_every=2",
        "--config.model.num_layers=1",
    ]
    assert call_command("train.py", train.main, *flags) == 0, capsys.readouterr().err
    fields = {"texts/3.txt": "data.paths (", "tokenizer.json": "data.tokenizer: "}
    for name, field in fields.items():
        whole = (tmp_path / name).read_text()
        changed = whole.replace("so", "no") if name.endswith(".txt") else whole + "\n"
        assert len(changed) - len(whole) == name.endswith(".json")
        (tmp_path / name).write_text(changed)
        capsys.readouterr()
        assert call_command("train.py", train.main, *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"train.py: error: {field}")
        assert "its contents are others" in line
        (tmp_path / name).write_text(whole)


IMPOSSIBLE = {
    "--config.seq_len=250": "seq_len=250 is not divisible by 2*sp (zigzag)=4; pad to 252",
    "--config.model.ffn_dim=63": "model.ffn_dim=63 is not divisible by tp=2; use 64 or fewer devices",
    "--config.model.num_kv_heads=1": "model.num_kv_heads=1 is not divisible by tp=2; use 2 or fewer devices",
    "--config.model.head_groups=3": "is not divisible by mesh.tp * model.head_groups=6; use fewer groups",
    "--config.batch_size=3": "eval_sequences=4: is not divisible by the 3 sequences that run at once; use",
    "--config.model.vocab_size=200": "model.vocab_size=200: the tokenizer 'bytes' has 257 tokens; use at least 257",
    "--config.eval_sequences=100000": "eval_sequences=100000: the ",
}


@pytest.mark.parametrize("flag", IMPOSSIBLE)
def test_train_refuses_the_impossible_before_compiling(corpus, tmp_path, flag, monkeypatch):
    monkeypatch.setattr(run_module, "initial_state", lambda *_: pytest.fail("went on to compile"))
    with pytest.raises(ConfigError) as error:
        run(corpus, tmp_path, flag)
    assert IMPOSSIBLE[flag] in str(error.value)
    assert "\n" not in str(error.value)


def test_train_says_an_error_in_one_line_with_status_2():
    command = [sys.executable, "train.py", TINY, "--config.model.num_layer=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: error: model.num_layer")
