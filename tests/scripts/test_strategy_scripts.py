"""The scripts that compare strategies and simulate unequal devices, on small cases."""

import json
import os
from pathlib import Path

import pytest
from command_lines import run_command, run_here

from scripts.benchmarks import approaches as compare

REPOSITORY = Path(__file__).parents[2]
TWO_CORES = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1


@pytest.mark.slow
@pytest.mark.nightly
def test_strategies_measures_every_approach(tmp_path):
    out = tmp_path / "strategies"
    sizes = ["--seq_len", 512, "--devices", 4, "--heads", 4, "--kv_heads", 4, "--head_dim", 16, "--window", 64]
    done = run_command("benchmarks strategies", *sizes, "--repeats", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 178
    rows = json.loads(out.with_suffix(".json").read_text())["approaches"]
    assert out.with_suffix(".png").stat().st_size > 20_000
    assert len(rows) == 9
    exact = {label: row["from_full"] < 1e-5 for label, row in rows.items()}
    assert [label for label, is_exact in exact.items() if not is_exact] == ["sparse", "sliding window"]
    for row in rows.values():
        assert 0 < row["error"] <= 2
        assert row["leak"] == 0
        assert row["seconds"] > 0

    def sent(label):
        return {int(devices): cost["sent"] for devices, cost in rows[label]["by_devices"].items()}

    everything = 2 * 512 * 4 * 16 * 4  # K and V of all devices
    assert (
        sent("ring")
        == sent("naive broadcast")
        == sent("ring self-attention")
        == {2: everything / 2, 4: 3 / 4 * everything}
    )
    assert sent("Ulysses")[4] == 2 * everything / 4 * 3 / 4
    assert sent("single device") == {1: 0}


def test_exponent_is_that_of_a_power_law():
    costs = {n: compare.Cost(memory=3 * n**2, sent=0) for n in (64, 128, 512)}
    row = compare.Row(by_length=costs, by_devices={2: costs[64], 4: compare.Cost(memory=3 * 32**2, sent=7)})
    assert row.exponent("length", "memory") == pytest.approx(2)
    assert row.exponent("devices", "memory") == pytest.approx(-2)
    assert row.exponent("length", "sent") is None
    assert row.exponent("devices", "sent") is None


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not TWO_CORES, reason="needs Linux and two cores")
def test_stragglers_measures_beside_the_prediction(tmp_path):
    out = tmp_path / "stragglers.json"
    for _ in range(3):  # other work on the same cores may hide the load from one measurement
        done = run_command("benchmarks stragglers", "--seq_len", 2048, "--heads", 2, "--repeats", 3, "--out", out)
        assert done.returncode == 0, done.stderr
        facts = json.loads(out.read_text())
        fast, slow = facts["calibration"]["seconds_per_pair"]
        if slow > 1.2 * fast:
            break
    assert slow > 1.2 * fast  # the load is there
    assert len(facts["rows"]) == 12
    for row in facts["rows"]:
        assert row["measured"] > 0
        assert row["predicted"] > 0


def test_simulate_ring_draws_unequal_devices(tmp_path):
    out = tmp_path / "timeline.png"
    done = run_here("figures simulate_ring", "--speeds", "1 0.5 1 1", "--seq_len", 4096, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "for_speeds" in done.stdout
    assert out.stat().st_size > 20_000
    wrong = run_here("figures simulate_ring", "--speeds", "1 fast")
    assert wrong.returncode == 2
    assert "speeds='1 fast' must be positive numbers" in wrong.stderr


def test_documents_are_drawn_before_and_after(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{"x" * n}"}}\n' for n in (300, 5000, 9000)))
    out, few = tmp_path / "documents.png", ("--speeds", "1 0.5 1 1", "--seq_len", 4096)
    done = run_here("figures documents", "--documents", f"{tmp_path}/*.jsonl", *few, "--out", out)
    assert done.returncode == 0, done.stderr
    for expected in ("documents", "unequal devices", "both", "for_speeds", "for_documents", "hops counted"):
        assert expected in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    wrong = run_here("figures documents", "--documents", f"{tmp_path}/*.jsonl", "--row", -1)
    assert wrong.returncode == 2
    assert "rows are counted from 0" in wrong.stderr


def test_worked_example_prints_what_the_document_says():
    done = run_here("figures worked_example")
    assert done.returncode == 0, done.stderr
    assert "64 GiB, 0.32 s at 200 GiB/s" in done.stdout
    assert "ring                                │      14.00 GiB" in done.stdout
