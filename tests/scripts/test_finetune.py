"""From a Hugging Face folder to another with one command, as a new user would, with mistakes."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
from command_lines import REPOSITORY as ROOT
from command_lines import words_of
from hf_folders import contents
from safetensors.numpy import load_file

from ring_attention.models.hf.source import open_source

DATA = f"--data={ROOT / 'ring_attention'}/**/*.py"
QUICK = ("--config.num_steps=4", "--config.optimizer.warmup_steps=1", "--config.seq_len=256", "--config.eval_every=2")


def run(name, *arguments):
    done = subprocess.run(
        [*words_of(name), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "hf"
    status, out, err = run("make_small_hf.py", f"--out={folder}", "--family=qwen3")
    assert (status, err) == (0, "")
    assert "qwen3, 2,361,280 random parameters" in out
    return folder


def test_make_small_hf_writes_a_whole_checkpoint(small):
    source = open_source(small)
    assert (source.config.family, source.config.max_len) == ("qwen3", 1024)
    assert {stored.dtype for stored in source.stored.values()} == {"BF16"}
    assert sorted(contents(small)) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.slow
def test_finetune_changes_values_and_context_alone(small, tmp_path):
    out = tmp_path / "tuned"
    longer = ("--config.seq_len=2048", "--config.model.rope.theta=1e6", "--config.optimizer.learning_rate=1e-3")
    status, screen, err = run("finetune.py", small, DATA, f"--out={out}", *QUICK, *longer)
    assert status == 0, err
    for words in (f"Beginning with the parameters of {small}", "model.rope.theta was 10000.0 and is 1000000.0"):
        assert words in screen
    assert "what it began with" in screen
    before, after = contents(small), contents(out)
    assert {name for name in after if after[name] != before.get(name)} == {"config.json", "model.safetensors"}
    assert after.keys() == before.keys()
    assert open_source(out).config.max_len == 2048
    assert open_source(out).config.model.rope.theta == 1e6
    old, new = load_file(small / "model.safetensors"), load_file(out / "model.safetensors")
    for name in old:
        assert (old[name].shape, old[name].dtype) == (new[name].shape, new[name].dtype)
    moved = [np.abs(old[name].astype(np.float32) - new[name].astype(np.float32)).max() for name in old]
    assert 0 < max(moved) < 0.1
    metrics = [json.loads(line) for line in (tmp_path / "tuned-run" / "metrics.jsonl").read_text().splitlines()]
    heldout = [line["heldout_loss"] for line in metrics if "heldout_loss" in line]
    assert metrics[0]["step"] == 0
    assert heldout[-1] < heldout[0] - 0.1


@pytest.mark.slow
def test_finetune_that_learns_nothing_writes_the_same_bytes(small, tmp_path):
    out = tmp_path / "same"
    flags = (
        small,
        DATA,
        f"--out={out}",
        *QUICK,
        "--config.optimizer.learning_rate=1e-30",
        "--config.log_every=2",
        "--config.num_steps=40",
    )
    command = [*words_of("finetune.py"), *map(str, flags)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in started.stdout:
        if line.startswith("step "):
            break
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=120)
    assert started.returncode == 143, err
    assert "the same command goes on" in err
    assert not out.exists()
    status, screen, err = run("finetune.py", *flags)
    assert status == 0, err
    assert "Going on from step" in screen
    assert contents(out) == contents(small)


MISTAKES = [
    (["{}/nowhere", DATA, "--out={}/out"], "is no folder; give the folder of a Hugging Face checkpoint"),
    ([str(ROOT / "docs"), DATA, "--out={}/out"], "config.json cannot be read"),
    (["{small}", "--data=nothing/*.txt", "--out={}/out"], "no file matches 'nothing/*.txt'"),
    (["{small}", DATA, "--out={small}"], "is there already, and not empty"),
    (["{small}", DATA, "--out={}/out", "--config.nmu_steps=3"], "did you mean num_steps?"),
    (["{small}", DATA, "--out={}/out", "--num_steps=3"], "did you mean --config.num_steps?"),
    (["{small}", DATA, "--out={}/out", "--config.seq_len=1000"], "pad to 1008"),
    (["{small}", DATA, "--out={}/out", "--config.seq_len=1048576"], "give more text, or evaluate fewer or shorter"),
    (["{small}", DATA, "--out={}/out", "--config.model.num_layers=3"], "holds a model with 4; use --config.model.num"),
    (["{small}", DATA, "--out={}/out", "--config.data.tokenizer=bytes"], "were trained with other tokens; use"),
    (["{small}", DATA, "--out={}/out", "--config.init_from=docs"], "is what the run begins with"),
    (
        ["{small}", DATA, "--out={}/out", "--config.attention.softcap=30"],
        "a model of the family 'qwen3' can only say 0.0",
    ),
    (["{small}", DATA, "--out={}/out", "--config.model.rope.scaling=yarn"], "give the window that the model"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=[row[1][:30] for row in MISTAKES])
def test_finetune_leaves_nothing_after_a_mistake(small, tmp_path, arguments, says):
    begun = time.monotonic()
    status, _, err = run("finetune.py", *(part.replace("{small}", str(small)).format(tmp_path) for part in arguments))
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("finetune.py: error: ")
    assert says in err
    assert list(tmp_path.iterdir()) == []  # no folder of a run that the next command would have to go on with
    assert time.monotonic() - begun < 60


def test_finetune_says_how_to_get_a_tokenizer(small, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in contents(small).items():
        if name != "tokenizer.json":
            (copy / name).write_bytes(data)
    (copy / "tokenizer.model").write_bytes(b"sentencepiece")
    status, _, err = run("finetune.py", copy, DATA, f"--out={tmp_path / 'out'}")
    assert status == 2
    assert "holds no tokenizer.json, the only form of tokenizer that is read; save it with AutoTokenizer" in err
