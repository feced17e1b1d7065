from command_lines import run_command, run_here


def _run(*flags):
    return run_command("benchmarks loss", *flags)


def test_every_way_is_timed():
    done = _run("--seq_len=64", "--model_dim=8", "--vocab_size=50", "--chunk=12", "--repeats=1")
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(way) for way in ("used while they exist", "made again", "all kept")] == [1, 1, 1]
    assert "T=64 over 2 devices, M=8 V=50, chunks of 12" in done.stdout


def test_sizes_that_mean_nothing_are_refused():
    assert (
        run_here("benchmarks loss", "--chunk=0")
        .stderr.splitlines()[-1]
        .endswith("--chunk must be positive; give at least 1; see python -m scripts.benchmarks loss --help")
    )
    assert (
        run_here("benchmarks loss", "--sp=3")
        .stderr.splitlines()[-1]
        .endswith("--sp=3 must divide --seq_len=8192; choose others; see python -m scripts.benchmarks loss --help")
    )
