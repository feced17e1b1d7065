import dataclasses

import pytest

from ring_attention.hardware.chips import CHIPS, chip_of


@pytest.mark.parametrize("name", CHIPS)
def test_chip_figures_are_positive_and_have_sources(name):
    chip = CHIPS[name]
    figures = {field.name for field in dataclasses.fields(chip)} - {"name", "platform", "kinds", "sources"}
    assert set(chip.sources) == figures
    assert all(getattr(chip, figure) > 0 for figure in figures)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v3", "v3"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_chip_of_knows_a_device_by_its_kind(kind, name):
    assert chip_of(kind) is CHIPS[name]


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA H200 NVL", "TPU v99", "cpu"])
def test_chip_of_takes_no_other_device_for_a_chip(kind):
    assert chip_of(kind) is None


def test_no_kind_of_device_is_that_of_two_chips():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert {chip.platform for chip in CHIPS.values()} == {"tpu", "gpu"}
    assert all(kind.startswith("TPU") == (chip.platform == "tpu") for chip in CHIPS.values() for kind in chip.kinds)
