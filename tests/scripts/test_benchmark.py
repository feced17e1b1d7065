"""The benchmark runs, counts what it says and refuses to compare results that differ."""

import json

import numpy as np
import pytest
from command_lines import run_command

from ring_attention.doctor.timing import System, seconds_in_turn
from scripts.benchmarks import timing


@pytest.mark.slow  # compiles 18 programs
@pytest.mark.nightly
def test_benchmark_attention_measures_layouts_and_masks(tmp_path):
    out = tmp_path / "cpu"
    done = run_command(
        "benchmarks attention", "--case", 64, 4, 2, 8, "--devices", 2, "--repeats", 1, "--forward", "--out", out
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(out.with_suffix(".json").read_text())
    (case,) = facts["gflops"]
    assert case["case"] == dict(tokens=64, heads=4, kv_heads=2, head_dim=8)
    names = [name for name in case["forward"] if name.startswith("ours")]
    assert names == ["ours, contiguous", "ours, zigzag", "ours, striped"]
    assert all(speed > 0 for speed in case["forward"].values())
    for kind in ("contiguous", "zigzag", "striped"):
        assert f"ours, {kind}" in done.stdout
        assert len(facts["masks"]["forward"][kind]) == 4
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def _system(name, results):
    return System(name, lambda: [np.asarray(x) for x in results])


def test_require_agreement_refuses_other_results():
    good = _system("good", [np.ones(4), np.ones(4)])
    timing.require_agreement([good, _system("rounds otherwise", [np.ones(4) + 1e-6, np.ones(4)])])
    with pytest.raises(RuntimeError, match="other and good differ in dq by 2.5e-01, relatively"):
        timing.require_agreement([good, _system("other", [np.ones(4), np.ones(4) * 1.25])])


def test_seconds_in_turn_gives_medians_of_rounds():
    now, runs = [0.0], []

    def system(name, seconds):
        left = iter(seconds)

        def run():
            runs.append(name)
            now[0] += next(left)

        return System(name, run)

    systems = [system("a", [1, 9, 2]), system("b", [5, 5, 7])]
    assert seconds_in_turn(systems, 3, lambda: now[0]) == {"a": 2, "b": 5}
    assert [sorted(runs[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
