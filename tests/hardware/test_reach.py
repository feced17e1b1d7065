"""What programs reach of chips, and how that is found."""

import dataclasses

import pytest

from ring_attention.hardware.chips import CHIPS
from ring_attention.hardware.reach import KERNEL_RATES, kernel_rate, reach_of


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_chip_has_fractions_and_a_source(chip):
    reach = reach_of(chip)
    fractions = (reach.matmul, reach.memory, reach.link, reach.network, reach.host_link)
    assert all(0 < fraction <= 1 for fraction in fractions)
    assert reach.source
    kernel = "splash" if chip.platform == "tpu" else "cudnn"
    for head_dim in (64, 128, 256):
        rate = kernel_rate(chip, kernel, head_dim)
        assert 0 < rate.backward <= rate.forward < 1
        named = chip.name in rate.chips
        assert rate.source.startswith("assumed to be as on ") != named


def test_a_kernel_has_the_rate_of_the_chip_and_the_head_dim():
    h100, a100 = (CHIPS[name] for name in ("h100", "a100"))
    assert kernel_rate(h100, "cudnn", 64).forward < kernel_rate(h100, "cudnn", 128).forward
    assert kernel_rate(a100, "cudnn", 128) != kernel_rate(h100, "cudnn", 128)
    assert {row.kernel for row in KERNEL_RATES} == {"cudnn", "tokamax", "splash"}


def test_tiles_of_xla_wait_for_the_scores_in_memory():
    h100 = CHIPS["h100"]
    rate = kernel_rate(h100, "xla", 128)
    assert 4.0e13 < rate.forward * h100.flops < 5.0e13  # 44 and 70 TFLOP/s of whole tiles were measured
    assert 6.5e13 < rate.backward * h100.flops < 7.5e13
    assert kernel_rate(h100, "xla", 64).forward == pytest.approx(rate.forward / 2)
    faster = dataclasses.replace(h100, memory_bandwidth=2 * h100.memory_bandwidth)
    assert kernel_rate(faster, "xla", 128).forward == pytest.approx(2 * rate.forward)
