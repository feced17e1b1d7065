"""Rings compiled for a TPU slice that is not there; needs the compiler, which `.ci/run` installs."""

import json

import jax
import pytest
from command_lines import run_command

from ring_attention.attention.kernels import splash, splash_calls
from ring_attention.hardware.pods import pod_devices
from ring_attention.planning.hlo.transfers import overlap_of
from ring_attention.planning.programs import compile_ring

pytestmark = pytest.mark.pod


def _check(tmp_path, **environment):
    out = tmp_path / "pods.json"
    done = run_command("verify pods", "v5e:4x4", "--out", out, timeout=900, **environment)
    return done, json.loads(out.read_text()) if out.exists() else None


def test_pods_transfers_are_one_link_with_work_beside(tmp_path):
    jax.devices()  # loads the compiler here as well, which must not keep it from the script
    done, rows = _check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all as required"
    ring, step = rows
    assert (ring["program"], step["program"]) == ("ring", "step")
    for row in rows:
        assert (row["devices"], row["links"], row["kernel"]) == (16, 1, "splash")
        assert row["overlap"]["synchronous"] == 0
        assert row["overlap"]["asynchronous"] >= 14  # K and V in 2 + 2 places, dK and dV in 3
        assert row["overlap"]["hidden"] + row["overlap"]["beside_other_work"] == row["overlap"]["asynchronous"]


def test_plan_agrees_with_the_compiler_of_the_pod(tmp_path):
    config = ["--config.attention.impl=splash", "--config.mesh.sp=16", "--config.seq_len=131072"]
    flags = ["--topology=v5e:4x4", "--compile", f"--out={tmp_path}", "--config.model.num_layers=8", *config]
    done = run_command("plan.py", *flags, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["memory"]["total"] == pytest.approx(plan["compiled"]["memory_total"], rel=0.15)
    assert plan["compiled"]["warnings"] == []
    transfers = plan["compiled"]["transfers"]
    assert len(transfers) >= 14
    assert all(transfer["asynchronous"] for transfer in transfers)
    in_loops = [transfer for transfer in transfers if transfer["runs"] > 8]  # once for each layer is 8
    assert len(in_loops) >= 6
    assert max(transfer["exposed_seconds"] for transfer in in_loops) == 0
    waiting = sum(transfer["exposed_seconds"] * transfer["runs"] for transfer in transfers)
    own = next(row for row in plan["strategies"] if row["strategy"] == "ring")
    assert waiting < 0.01 * own["step_seconds"]


@pytest.mark.parametrize(("waits", "beside_hops"), [(True, range(12, 15)), (False, range(4))])
def test_rings_of_few_heads_compute_hops_beside_their_transfers(waits, beside_hops, monkeypatch):
    """A hop takes 0.15 ms, its transfers 0.05, which picking lse out of what the kernel gave could hide alone."""
    if not waits:
        for module in (splash, splash_calls):
            monkeypatch.setattr(module, "wait", lambda results, after: results)
    sizes = dict(shard=8192, heads=16, kv_heads=2, head_dim=128)
    ring = compile_ring(pod_devices("v6e:4x4"), **sizes, causal=True, layout="zigzag", impl="splash")
    overlap = overlap_of(ring.as_text())
    assert overlap.synchronous == 0
    assert overlap.hidden in beside_hops
    assert (overlap.exposed == 0) == waits
