import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def _run(*flags):
    command = [sys.executable, "scripts/benchmark_decode.py", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_every_way_is_timed_at_every_filling():
    done = _run("--slots=600", "--heads=4", "--kv-heads=2", "--head-dim=8", "--rows=2", "--repeats=1")
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(way) for way in ("pass over slots", "dense", "blockwise")] == [3, 3, 3]
    assert "B=2 S=600 H=4 K=2 D=8" in done.stdout


def test_sizes_that_mean_nothing_are_refused():
    assert (
        _run("--slots=0")
        .stderr.splitlines()[-1]
        .endswith("--slots must be positive; give at least 1; see benchmark_decode.py --help")
    )
    assert (
        _run("--kv-heads=5")
        .stderr.splitlines()[-1]
        .endswith("--kv-heads=5 must divide --heads=32; choose others; see benchmark_decode.py --help")
    )
