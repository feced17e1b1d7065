"""The scripts run as a user runs them, on small cases."""

import json
from pathlib import Path

import pytest
from command_lines import run_command, run_here

REPOSITORY = Path(__file__).parents[2]


def test_programs_finds_the_fewest_transfers_alone(tmp_path):
    out = tmp_path / "structure.json"
    done = run_command("verify programs", "--rings", 4, "--shard", 64, "--dtype", "bfloat16", "--out", out)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 110
    forward, both = json.loads(out.read_text())
    assert forward["permutes"] == forward["permutes_bound"] == 6
    assert both["permutes_bound"] == both["permutes_written"] == 18
    for row in (forward, both):
        assert (row["window"], row["duplex"], row["unroll"]) == (None, False, False)
        assert row["bytes_written"] == row["bytes_bound"]
        assert row["all_gathers"] == row["other_collectives"] == 0


@pytest.mark.slow
@pytest.mark.nightly
def test_programs_compares_a_loop_with_an_unrolled_ring(tmp_path):
    out = tmp_path / "structure.json"
    flags = ["--rings", 4, "--shard", 64, "--layout", "contiguous", "--window", 0, 33, "--program", "backward"]
    done = run_command("verify programs", *flags, "--duplex", "--compare", "--out", out)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 110
    rows = json.loads(out.read_text())
    assert [(row["window"], row["unroll"]) for row in rows] == [(None, False), (None, True), (33, False), (33, True)]
    token = 2 * 64 * 4  # bytes of a key of 2 heads of 64
    for row in rows:
        tokens = 3 * 64 if row["window"] is None else 32  # once as keys, values and their gradients each
        assert row["duplex"]
        assert row["bytes_sent"] == row["bytes_written"] == row["bytes_bound"] == 4 * tokens * token
        halves = row["bytes_back_written"] == row["bytes_written"] // 2
        assert halves, "keys go back as far as their gradients forth"
        assert row["permutes"] == row["permutes_bound"]
        assert row["synchronous"] + row["asynchronous"] <= row["permutes"]
        assert row["temporary_bytes"] > 0


def test_programs_says_what_is_wrong_with_a_topology():
    done = run_here("verify programs", "--topology", "v5e:nowhere")
    assert done.returncode == 2
    assert "v5e:nowhere" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_accuracy_accepts_ours_and_can_fail(tmp_path):
    out = tmp_path / "accuracy.json"
    done = run_command("verify accuracy", "--tokens", 128, "--rings", 64, "--only_rings", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())
    assert result["ring_size"] == 64
    assert 0 < result["worst_ratio"] <= 2
    assert result["mask"] == "causal"
    missed = run_command("verify accuracy", "--tokens", 128, "--rings", 2, "--only_rings", "--limit", 0.01)
    assert missed.returncode == 1, missed.stdout + missed.stderr


@pytest.mark.slow
@pytest.mark.nightly
def test_accuracy_has_every_mask_at_once(tmp_path):
    out = tmp_path / "accuracy.json"
    flags = ["--tokens", 64, "--masks", "everything", "--dtypes", "float16", "--rings"]
    done = run_command("verify accuracy", *flags, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())
    assert (result["mask"], result["dtype"]) == ("everything", "float16")
    assert 0 < result["worst_ratio"] <= 2


def test_ring_writes_a_picture(tmp_path):
    done = run_here("figures ring", tmp_path / "ring.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")
