"""The scripts run as a user runs them, on small cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(script, *flags):
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, REPOSITORY / "scripts" / script, *map(str, flags)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_inspect_program_finds_the_fewest_transfers_and_no_other_collective(tmp_path):
    out = tmp_path / "structure.json"
    done = run("inspect_program.py", "--rings", 4, "--shard", 64, "--dtype", "bfloat16", "--out", out)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 110
    forward, both = json.loads(out.read_text())
    assert forward["permutes"] == forward["permutes_bound"] == 6
    assert both["permutes_bound"] == 20
    for row in (forward, both):
        assert row["bytes_written"] == row["bytes_bound"]
        assert row["all_gathers"] == row["other_collectives"] == 0


def test_check_accuracy_accepts_ours_and_its_limit_can_be_missed(tmp_path):
    out = tmp_path / "accuracy.json"
    done = run("check_accuracy.py", "--tokens", 128, "--rings", 64, "--only-rings", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())
    assert result["ring_size"] == 64
    assert 0 < result["worst_ratio"] <= 2
    missed = run("check_accuracy.py", "--tokens", 128, "--rings", 2, "--only-rings", "--limit", 0.01)
    assert missed.returncode == 1, missed.stdout + missed.stderr


def test_draw_ring_writes_a_picture(tmp_path):
    done = run("draw_ring.py", tmp_path / "ring.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")
