"""The planner as a person calls it."""

import importlib.util
import json
import re
import shlex

import pytest
from command_lines import REPOSITORY, run_here

from ring_attention.hardware.topology import find_topology
from ring_attention.models.hf.presets import PRESETS
from ring_attention.planning.plan import make_plan
from ring_attention.training.flags import override, parse_config

_CUDNN = ["--config.attention.impl=cudnn"]


def _plan(*flags):
    return run_here("plan.py", *flags)


def test_plan_has_tables_a_recommendation_and_pictures(tmp_path):
    done = _plan("--config=configs/gpu_8xh100_7b.py", "--topology=h100:1x8", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    for title in ("Memory of a device", "Sent by a device", "waits for nothing", "A step by each strategy", "source"):
        assert title in done.stdout
    assert "On this mesh take " in done.stdout
    assert "Fastest that fits" in done.stdout
    assert "Longest context" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["recommended"]
    assert written["advice"]["fastest"]["fits"]
    for picture in ("memory.png", "timeline.png", "map.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_plan_predicts_what_dealing_documents_gains(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (300, 9000, 40000)))
    h100 = ("--config=configs/gpu_8xh100_7b.py", "--topology=h100:1x8", "--no_search", "--config.seq_len=65536")
    done = _plan(*h100, f"--documents={tmp_path}/*.jsonl", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    for expected in (
        "ring, zigzag",
        "ring, dealt",
        "ulysses",
        "MagiAttention",
        "up to 1.48",
        "drawn from 3 in",
        "assumed",
    ):
        assert expected in words
    packed = json.loads((tmp_path / "plan.json").read_text())["packed"]
    assert packed["documents"]["most_tokens"] == 10_001
    ways = {way["name"]: way for way in packed["ways"]}
    assert ways["ring, zigzag"]["attention_speedup"] == 1 < ways["ring, dealt"]["attention_speedup"]
    assert ways["ring, dealt"]["balance"] < ways["ring, zigzag"]["balance"]
    missing = _plan(*h100, f"--documents={tmp_path}/*.txt")
    assert missing.returncode == 2
    assert "no file matches" in missing.stderr


def test_plan_says_which_context_would_fit():
    done = _plan("--topology=v5e:16x16", "--config.seq_len=33554432")
    assert done.returncode == 1
    assert "This config does not fit" in done.stdout
    assert "tokens would" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=v9:4x4"], "choose one of v3"),
        (["--topology=v5e:4x4x4"], "write it like v5e:16x16"),
        (["--topology=v5e:4x4"], "v5e:4x4 has 16"),
        (["--topologie=v5e:4x4"], "there is no such flag"),
        (["--config=configs/nothing.py"], "there is no such file"),
        (["--config.seq_len=1000"], "seq_len"),
        (["--config.model.num_heads=33"], "num_heads"),
        (["--config.attention.impl=cudnn"], "runs on gpu devices"),
        (["--config=tiny", "--topology=v5e:2x4", "--config.attention.strategy=sparse"], "does not know how long"),
        (["--config=gpu_8xh100_7b", "--topology=h100:1x8", *_CUDNN, "--config.attention.softcap=30"], "no softcap"),
        (["llama-3.1-8b", "--topology=h100:16x8", *_CUDNN, "--config.attention.strategy=all_gather"], "511 calls"),
        (["llama-3.1-8"], "did you mean llama-3.1-8b?"),
        (["mixtral-8x7b"], "is a mixture of experts"),
        (["llama-3.1-8b", "qwen3-8b"], "one model is planned"),
        (["--compile", "llama-3.1-8b", "--config=tiny"], "names the model already"),
        (["llama-3.1-8b", "--tokens=1.3"], "write it like 131072, 128K or 1.5M"),
        (["llama-3.1-8b", "--tokens=0"], "must be a positive whole number"),
        (["llama-3.1-8b", "--tokens=1M", "--config.seq_len=5"], "says how long a sequence is"),
        (["llama-3.1-8b", "--network=400Gb"], "no network between its devices"),
        (["llama-3.1-8b", "--topology=h100:2x8", "--network=400"], "write it like 400Gb or 50GB"),
    ],
)
def test_a_mistake_costs_one_line(flags, words):
    done = _plan(*flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is installed")
def test_plan_names_the_extra_with_the_compiler():
    done = _plan("--config=configs/tiny.py", "--topology=v5e:2x4", "--compile")
    assert done.returncode == 2
    assert "pip install -e '.[compile-tpu]'" in done.stderr.splitlines()[-1]


def _advised(done):
    for line in done.stdout.splitlines():
        if "train.py" in line:
            words = shlex.split(line)
            start = words.index("train.py")
            yield words[:start], parse_config(words[start + 1 :], str(REPOSITORY / "configs" / "cpu_demo.py"))


def test_plan_advises_a_command_that_trains_what_was_planned(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    flags = ["--config=gpu_8xh100_7b", "--config.attention.strategy=usp", "--config.attention.ulysses_size=2"]
    done = _plan(*flags, "--config.name=with spaces", "--topology=h100:1x8", "--no_search")
    assert done.returncode == 0, done.stderr
    ((before, config),) = _advised(done)
    assert before == ["XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "python"]
    assert (config.name, config.model.num_layers) == ("with spaces", 32)
    assert config.attention.strategy != "usp"
    assert config.attention.ulysses_size == 0, "it would be refused with another strategy"
    others = [line for line in done.stdout.splitlines() if "train.py" not in line]
    assert max(map(len, others)) <= 80


def test_plan_of_a_preset_ends_with_commands_for_the_fastest_step_and_the_longest_context(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    done = _plan("llama-3.1-8b", "--tokens=1M", "--topology=h100:1x8", "--config.batch_size=2")
    assert done.returncode == 1, "the config as it is does not fit"
    configs = [config for _, config in _advised(done)]
    assert [config.name for config in configs] == ["llama-3.1-8b"] * len(configs)
    assert [config.seq_len > 2**20 for config in configs] == [False] * (len(configs) - 1) + [True]
    for config in configs:
        assert (config.batch_size, config.eval_sequences % config.micro_batch_size) == (2, 0)
        assert make_plan(config, find_topology("h100:1x8")).own.fits


def test_plan_of_a_folder_needs_its_config_json_alone(tmp_path):
    folder = tmp_path / "its model's"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PRESETS["qwen3-8b"].values))
    done = _plan("--topology", "h100:1x8", "--no_search", folder, "--tokens", "128K")
    assert done.returncode == 0, done.stderr
    assert "8,190,735,360 parameters, 131,072 tokens of context" in " ".join(done.stdout.split())
    ((_, config),) = _advised(done)
    assert (config.seq_len, config.model.qk_norm) == (2**17, True)


def test_plan_says_what_each_kind_of_layer_sends():
    words = " ".join(_plan("gemma-3-27b", "--no_search", "--topology=v5p:4x4x4", "--tokens=1M").stdout.split())
    assert "Attention by kind of layer" in words
    assert re.search(r"global │ 10 │ ring │ .*window │ 52 │ ring ", words)
    assert "attention kernel of 52 layers, window 1,024: splash" in words
    assert "by kind of layer" not in _plan("qwen3-32b", "--no_search", "--topology=v5p:4x4x4").stdout


def test_plan_takes_the_network_that_it_is_told():
    flags = ["llama-3.1-8b", "--tokens=128K", "--topology=h100:2x8", "--no_search"]
    for words, told in (("50.0 GB/s to other", []), ("12.5 GB/s to other", ["--network=100Gb"])):
        assert words in " ".join(_plan(*flags, *told).stdout.split())


def test_flags_of_every_candidate_choose_it():
    overrides = ["--config.attention.duplex=true", "--config.mesh.tp=1"]
    config = parse_config(["--config=tpu_v5e_256_7b", *overrides], str(REPOSITORY / "configs" / "cpu_demo.py"))
    plan = make_plan(config, find_topology("v5e:16x16"))
    for candidate in plan.candidates:
        strategy = override(config, candidate.flags(config)).attention.make_strategy()
        assert candidate.label.split()[0] == strategy.name
        assert ("duplex=True" in candidate.label) == getattr(strategy, "duplex", False)


def test_plan_prints_table_2():
    done = _plan("--table2")
    assert done.returncode == 0
    assert "149.5 | 149.8" in done.stdout
