from command_lines import run_command, run_here


def _run(*flags):
    return run_command("benchmarks decode", *flags)


def test_every_way_is_timed_at_every_filling():
    done = _run("--slots=600", "--heads=4", "--kv_heads=2", "--head_dim=8", "--rows=2", "--repeats=1")
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(way) for way in ("pass over slots", "dense", "blockwise")] == [3, 3, 3]
    assert "B=2 S=600 H=4 K=2 D=8" in done.stdout


def test_sizes_that_mean_nothing_are_refused():
    assert (
        run_here("benchmarks decode", "--slots=0")
        .stderr.splitlines()[-1]
        .endswith("--slots must be positive; give at least 1; see python -m scripts.benchmarks decode --help")
    )
    assert (
        run_here("benchmarks decode", "--kv_heads=5")
        .stderr.splitlines()[-1]
        .endswith("--kv_heads=5 must divide --heads=32; choose others; see python -m scripts.benchmarks decode --help")
    )
