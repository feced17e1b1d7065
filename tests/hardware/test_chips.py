import dataclasses

import pytest

from ring_attention.hardware.chips import CHIPS, chip_of


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_is_positive_and_has_a_source(name):
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
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    assert chip_of(kind) is CHIPS[name]


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "TPU v99", "cpu"])
def test_other_devices_are_not_taken_for_one_of_the_table(kind):
    assert chip_of(kind) is None
