"""Measuring a trained model as a person calls it."""

import json
import re

import jax
import pytest
from command_lines import call_command

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.commands import evaluate as command
from ring_attention.commands import make_retrieval_data
from ring_attention.models.config import ModelConfig
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import DataConfig, TrainConfig
from ring_attention.training.run_folder import open_run_folder
from ring_attention.training.state import make_state

MODEL = ModelConfig(vocab_size=264, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=6, ffn_dim=24)
PNG = b"\x89PNG"


def make_data(*flags):
    return call_command("make_retrieval_data.py", make_retrieval_data.main, *flags)


def evaluate_command(*flags):
    return call_command("evaluate.py", command.main, *flags)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What make_retrieval_data.py writes."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    flags = ["--shortest=20", "--longest=200", "--documents=60", "--seed=3"]
    assert make_data(f"--out={path}", *flags) == 0
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data):
    """The folder of a run whose model knows nothing."""
    path = tmp_path_factory.mktemp("run")
    held_out = DataConfig(paths=str(data), holdout_fraction=0.3)
    config = TrainConfig(name="x", model=MODEL, seq_len=40, num_steps=200, run_dir=str(path), data=held_out)
    state = make_state(config, ra.make_mesh(sp=1, devices=jax.devices()[:1]))
    with open_run_folder(config) as folder, Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(1, state, {})
    return path


@pytest.fixture
def evaluate(checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")

    def run(subcommand, *flags):
        """(exit status, stdout, stderr)."""
        given = any(flag.startswith("--checkpoint") for flag in flags)
        checkpoints = [] if given else [f"--checkpoint={checkpoint}"]
        status = evaluate_command(subcommand, *checkpoints, f"--out={tmp_path}/out", *flags)
        return status, *capsys.readouterr()

    return run


def test_make_retrieval_data_obeys_lengths_and_seed(data, tmp_path):
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    assert len(texts) == 60
    assert all(20 <= len(text) <= 200 for text in texts)
    assert all(re.search(r"key=([A-X]{3})\. .*key=\1\.$", text) for text in texts)
    flags = [f"--out={tmp_path}/new/again", "--shortest=20", "--longest=200", "--documents=60"]
    assert make_data(*flags, "--seed=3") == 0
    assert (tmp_path / "new" / "again").read_bytes() == data.read_bytes()
    assert make_data(*flags, "--seed=4") == 0
    assert (tmp_path / "new" / "again").read_bytes() != data.read_bytes()


def test_evaluate_needle_writes_table_picture_and_numbers(evaluate, tmp_path):
    flags = ["--lengths=64,45", "--depths=3", "--samples=2", "--needles=2", "--config.attention.window=20"]
    status, out, err = evaluate("needle", *flags, "--config.mesh.dp=2", "--config.mesh.sp=4")
    assert status == 0, err
    assert "window 20, trained at 40" in out
    assert re.search(r"depth │? ?.*45 .*64", out)
    assert "Note: up to 64 tokens, but the model was trained on sequences of 40." in err
    values = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert (values["lengths"], values["depths"], values["count"]) == ([45, 64], [0.0, 0.5, 1.0], 4)
    assert values["config"]["attention"]["window"] == 20
    assert values["versions"]["jax"] == jax.__version__
    assert [len(row) for row in values["accuracy"]] == [2, 2, 2]
    assert (tmp_path / "out" / "needle.png").read_bytes().startswith(PNG)
    both = [str(tmp_path / "out" / "needle.json")] * 2
    assert (
        call_command(
            "evaluate.py", command.main, "heat-maps", *both, f"--out={tmp_path}/both.png", "--titles", "a", "b"
        )
        == 0
    )
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    assert (
        call_command(
            "evaluate.py", command.main, "heat-maps", both[0], f"--out={tmp_path}/both.png", "--titles", "a", "b"
        )
        == 2
    )
    assert evaluate_command("heat-maps", f"{tmp_path}/both.png", f"--out={tmp_path}/c.png") == 2


@pytest.mark.slow
def test_evaluate_perplexity_reads_held_out_or_other_paths(evaluate, tmp_path):
    status, out, err = evaluate("perplexity", "--windows=8,20", "--documents=3")
    assert status == 0, err
    assert "of 40 tokens" in out
    assert re.search(r"0 to 15", out)
    values = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert list(values["losses"]) == ["as it is", "window 8", "window 20"]
    assert values["edges"] == [0, 16, 32, 40]
    assert values["losses"]["window 20"]["more_nats_per_token"][0] == pytest.approx(0, abs=1e-4)
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(PNG)
    (tmp_path / "text.txt").write_text("some text " * 9)
    flags = [f"--paths={tmp_path}/text.txt", "--length=50", "--windows="]
    status, out, err = evaluate("perplexity", *flags)
    assert status == 0, err
    values = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert (values["documents"], values["losses"]["as it is"]["standard_error"]) == (1, [None] * 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["needle", "--checkpoint=nowhere"], "checkpoint='nowhere': has no config.json"),
        (["needle", "--lengths=15"], "length=15: holds no needle and question, which take 16 tokens; give longer"),
        (["needle", "--lengths=a"], "lengths='a': must be positive whole numbers; write --lengths=1024,4096"),
        (["needle", "--depths=1"], "depths=1: must be at least 2"),
        (["needle", "--samples=0"], "samples=0: must be positive"),
        (["needle", "--batch_size=0"], "batch_size=0: must be positive"),
        (["needle", "--needles=13"], "needles=13: must be 1 to 12"),
        (["needle", "--key=words"], "key='words': is not known; choose one of letters, digits"),
        (
            ["needle", "--config.model.num_layers=2"],
            "--config.model.num_layers=2: is a matter of training; change",
        ),
        (["needle", "--config.attention.windw=2"], "attention.windw='2': there is no such field; did you mean"),
        (["needle", "--config.mesh.sp=5"], "--config.mesh.sp=-1 takes all that are left"),
        (["needle", "--lenghts=20"], "--lenghts=20: there is no such flag"),
        (["perplexity", "--windows=40"], "windows=40: shows all of length=40; use a smaller one, or a longer --length"),
        (["perplexity", "--length=201", "--windows=8"], "length=201: no document has so many tokens, the longest has"),
        (["perplexity", "--paths=nowhere/*", "--windows=8"], "data.paths='nowhere/*': no file matches"),
        (["perplexity", "--documents=0"], "documents=0: must be positive"),
    ],
)
def test_a_mistake_costs_one_line_and_no_compilation(evaluate, flags, words, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)
    status, out, err = evaluate(*flags)
    assert (status, out) == (2, "")
    assert err.startswith("evaluate.py: error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [["needle", "--lengths=30", "--samples=1"], ["perplexity", "--windows=8"]])
def test_texts_begin_with_what_generation_feeds(evaluate, flags, monkeypatch):
    def asked(trained, tokenizer):
        raise ConfigError(f"{trained.checkpoint.name}, {tokenizer.document_start}")

    monkeypatch.setattr("ring_attention.evaluation.model_source.prompt_start", asked)
    assert evaluate(*flags) == (2, "", "evaluate.py: error: 1, 256\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shortest=16"], "shortest=16: needles and question take 17 characters; use at least that"),
        (["--longest=19"], "longest=19: is less than shortest=20; give more"),
        (["--documents=0"], "documents=0: must be positive"),
        (["--out=README.md/x"], "out='README.md/x': cannot be written (File exists); name another"),
    ],
)
def test_make_retrieval_data_refuses_mistakes_in_a_line(capsys, tmp_path, flags, words):
    assert make_data(f"--out={tmp_path}/x", "--documents=2", *flags) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
