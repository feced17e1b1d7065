import types

import jax
import pytest

from ring_attention.training.devices import machine_peak_flops


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
def test_an_accelerator_has_its_published_peak_times_the_number_of_devices(kind, teraflops):
    peak, source = machine_peak_flops(devices(kind, 4))
    assert peak == pytest.approx(4 * teraflops * 1e12)
    assert f"4 x {kind}" in source


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA B200", "TPU v99"])
def test_an_accelerator_that_is_not_in_the_table_has_no_peak_but_a_reason(kind):
    peak, reason = machine_peak_flops(devices(kind, 1, platform="gpu"))
    assert peak is None
    assert kind in reason


def test_simulated_cpu_devices_share_one_measured_peak():
    eight, source = machine_peak_flops(jax.devices())
    assert eight == machine_peak_flops(jax.devices()[:1])[0]
    assert 1e9 < eight < 1e14
    assert "measured" in source
