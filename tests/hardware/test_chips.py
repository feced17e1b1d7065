import dataclasses

import pytest

from ring_attention.hardware.chips import CHIPS, chip_of


@pytest.mark.parametrize("name", CHIPS)
def test_chip_figures_are_positive_and_have_sources(name):
    chip = CHIPS[name]
    figures = {field.name for field in dataclasses.fields(chip)} - {"name", "kinds", "sources"}
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
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_chip_of_knows_a_device_by_its_kind(kind, name):
    assert chip_of(kind) is CHIPS[name]


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "TPU v99", "cpu"])
def test_chip_of_takes_no_other_device_for_a_chip(kind):
    assert chip_of(kind) is None
