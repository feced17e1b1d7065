import pytest

from ring_attention.checks import ConfigError
from ring_attention.hardware.topology import find_topology


@pytest.mark.parametrize(
    ("name", "chip", "devices"),
    [
        ("v5e:16x16", "v5e", 256),
        ("v4:8x8x8", "v4", 512),
        ("v3:16x16", "v3", 512),
        ("tpu7x:4x4x4", "tpu7x", 128),
        ("h100:4x8", "h100", 32),
        ("a100-40:1x8", "a100-40", 8),
        ("2xv5e:16x16", "v5e", 512),
        ("1xv5e:2x4", "v5e", 8),
        ("12xtpu7x:2x2x1", "tpu7x", 96),
    ],
)
def test_find_topology_tells_chip_and_number_of_devices(name, chip, devices):
    topology = find_topology(name)
    assert (topology.chip.name, topology.devices) == (chip, devices)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:4x4", "choose one of v3, v4"),
        ("16x16", "choose one of"),
        ("v5e", "write it like v5e:16x16"),
        ("v5e:4x4x4", "needs 2 positive sides"),
        ("v4:16x16", "write it like v4:8x8x8"),
        ("v5e:0x16", "positive"),
        ("v5e:axb", "write it like"),
        ("h100:8", "4 hosts of 8 GPUs"),
        ("", "choose one of"),
        ("2x", "choose one of"),
        ("2xv5e", "write it like v5e:16x16"),
        ("0xv5e:16x16", "a number of slices, is at least 1"),
        ("2xh100:1x8", "is for TPUs; the first side counts a GPU's hosts; write it like h100:4x8"),
    ],
)
def test_find_topology_refuses_in_one_line_with_a_remedy(name, words):
    with pytest.raises(ConfigError) as error:
        find_topology(name)
    assert f"topology={name!r}" in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_box_is_the_most_cubic_one():
    assert find_topology("v4:8x8x8").box(64) == (4, 4, 4)
    assert find_topology("v5e:16x16").box(32) in [(4, 8), (8, 4)]
    assert find_topology("v5e:16x16").box(24) == (24,)  # no box of the grid has 24 devices


def test_wraps_follows_the_links_of_the_chip():
    assert find_topology("v5e:16x16").wraps(16)
    assert not find_topology("v5e:8x8").wraps(8)
    assert find_topology("v4:4x4x8").wraps(4)
    assert not find_topology("v4:8x8x8").wraps(4)


@pytest.mark.parametrize(
    ("name", "domain"),
    [("h100:4x8", 8), ("gb200:2x72", 72), ("v5e:16x16", 256), ("2xv5e:16x16", 256), ("3xtpu7x:2x2x1", 8)],
)
def test_domain_is_what_links_join(name, domain):
    assert find_topology(name).domain == domain
