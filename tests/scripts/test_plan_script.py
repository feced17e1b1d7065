"""The planner as a person calls it."""

import importlib.util
import json
import shlex

import pytest
from command_lines import REPOSITORY, run_here

from ring_attention.hardware.topology import find_topology
from ring_attention.planning.plan import make_plan
from ring_attention.training.flags import override, parse_config


def _plan(*flags):
    return run_here("plan.py", *flags)


def test_plan_has_tables_a_recommendation_and_pictures(tmp_path):
    done = _plan("--config=configs/gpu_8xh100_7b.py", "--topology=h100:1x8", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    for title in ("Memory of a device", "Sent by a device", "waits for nothing", "A step by each strategy", "source"):
        assert title in done.stdout
    assert "Take " in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["recommended"]
    for picture in ("memory.png", "timeline.png", "map.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


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
    (line,) = (line for line in done.stdout.splitlines() if "train.py" in line)
    words = shlex.split(line)
    start = words.index("train.py")
    return words[:start], parse_config(words[start + 1 :], str(REPOSITORY / "configs" / "cpu_demo.py"))


def test_plan_advises_a_command_that_trains_what_was_planned(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    flags = ["--config=gpu_8xh100_7b", "--config.attention.strategy=usp", "--config.attention.ulysses_size=2"]
    done = _plan(*flags, "--config.name=with spaces", "--topology=h100:1x8")
    assert done.returncode == 0, done.stderr
    before, config = _advised(done)
    assert before == ["XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "python"]
    assert (config.name, config.model.num_layers) == ("with spaces", 32)
    assert config.attention.strategy != "usp"
    assert config.attention.ulysses_size == 0, "it would be refused with another strategy"
    others = [line for line in done.stdout.splitlines() if "train.py" not in line]
    assert max(map(len, others)) <= 80


def test_flags_of_every_candidate_choose_it():
    overrides = ["--config.attention.duplex=true", "--config.mesh.tp=1"]
    config = parse_config(["--config=tpu_v5e_256_7b", *overrides], str(REPOSITORY / "configs" / "cpu_demo.py"))
    plan = make_plan(config, find_topology("v5e:16x16"))
    for candidate in plan.candidates:
        strategy = override(config, list(candidate.flags)).attention.make_strategy()
        assert candidate.label.split()[0] == strategy.name
        assert ("duplex=True" in candidate.label) == getattr(strategy, "duplex", False)


def test_plan_prints_table_2():
    done = _plan("--table2")
    assert done.returncode == 0
    assert "149.5 | 149.8" in done.stdout
