"""What a run takes of its machine: memory that is kept, and the peak speed that its own is compared with."""

import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from ring_attention.configs import tiny
from ring_attention.training.devices import machine_peak_flops, warn_of_order

REPOSITORY = Path(__file__).parents[2]
PAGES = 16384

FAULTS = """
import resource
from ring_attention.training.devices import keep_freed_memory, return_freed_memory
{call}
def step():
    b"1" * ({pages} * resource.getpagesize())
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults_of_second_step(call):
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    code = FAULTS.format(call=call, pages=PAGES)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what Linux and glibc do")
def test_keep_freed_memory_reuses_pages_without_new_faults():
    assert _faults_of_second_step("assert keep_freed_memory()") < PAGES / 10
    assert _faults_of_second_step("") >= PAGES  # the control: the system clears and maps each of them again
    assert _faults_of_second_step("assert keep_freed_memory() and return_freed_memory()") >= PAGES


def devices(kind, count, platform="tpu"):
    return [types.SimpleNamespace(platform=platform, device_kind=kind)] * count


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
    ],
)
def test_machine_peak_of_accelerators_is_the_published_one(kind, teraflops):
    peak, source = machine_peak_flops(devices(kind, 4))
    assert peak == pytest.approx(4 * teraflops * 1e12)
    assert f"4 x {kind}" in source


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA B900", "TPU v99"])
def test_machine_peak_of_an_unknown_device_is_a_reason(kind):
    peak, reason = machine_peak_flops(devices(kind, 1, platform="gpu"))
    assert peak is None
    assert kind in reason


def test_machine_peak_is_shared_by_simulated_devices():
    eight, source = machine_peak_flops(jax.devices())
    assert eight == machine_peak_flops(jax.devices()[:1])[0]
    assert 1e9 < eight < 1e14
    assert "measured" in source


@pytest.mark.parametrize(
    ("platform", "impl", "dtype", "flags", "warns"),
    [
        ("gpu", "auto", "bfloat16", "", True),
        ("gpu", "cudnn", "bfloat16", "--xla_gpu_exclude_nondeterministic_ops=true", False),
        ("gpu", "xla", "bfloat16", "", False),
        ("gpu", "auto", "float32", "", False),
        ("tpu", "auto", "bfloat16", "", False),
    ],
)
def test_gradients_in_no_fixed_order_are_told_of(platform, impl, dtype, flags, warns, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    config = tiny.get_config()
    attention = dataclasses.replace(config.attention, impl=impl)
    model = dataclasses.replace(config.model, compute_dtype=dtype)
    lines = warn_of_order(dataclasses.replace(config, attention=attention, model=model), platform)
    assert ["bit by bit only with XLA_FLAGS=--xla_gpu_exclude" in line for line in lines] == [True] * warns
