import pytest

from ring_attention.hardware.rates import wires_of
from ring_attention.hardware.topology import find_topology


def test_gpus_behind_a_switch_send_at_one_links_rate_whatever_the_way():
    wires, link = wires_of(find_topology("h100:1x8"), 8), find_topology("h100:1x8").reached.link
    assert (wires.hop, wires.hop_both, wires.gather, wires.swap, wires.kind) == (link, link, link, link, "NVLink")


@pytest.mark.parametrize("group", [2, 4, 8])
def test_gpus_wired_to_each_other_have_a_link_for_a_hop_and_all_for_an_all_gather(group):
    wires, link = wires_of(find_topology("mi300x:2x8"), group), find_topology("mi300x:1x8").reached.link
    assert wires.hop == link
    assert wires.hop_both == min(group - 1, 2) * link
    assert wires.gather == wires.swap == (group - 1) * link
    assert wires.kind == "Infinity Fabric"


def test_gpus_of_several_hosts_wait_for_the_adapters():
    chip = find_topology("mi300x:1x8").reached
    wires = wires_of(find_topology("mi300x:2x8"), 16)
    assert wires.hop == chip.network
    assert wires.gather == 7 * chip.link  # 8 adapters bring 800 GB/s of the other half
    assert wires.swap == 2 * chip.network
    alone = wires_of(find_topology("mi300x:4x8"), 4, stride=8)  # one of each host
    assert alone.gather == pytest.approx(chip.network * 4 / 3)


def test_a_rack_of_72_gpus_is_one_domain_of_links():
    rack, two = find_topology("gb200:1x72"), find_topology("gb200:2x72")
    assert wires_of(rack, 72).hop == wires_of(rack, 72).gather == find_topology("gb200:1x8").reached.link
    assert wires_of(two, 144).hop == find_topology("gb200:1x8").reached.network


def test_slices_are_joined_by_the_data_centre_network():
    chip, two = find_topology("v5e:16x16").reached, find_topology("2xv5e:16x16")
    ring, pairs, within = wires_of(two, 512), wires_of(two, 2, stride=256), wires_of(two, 256)
    assert (ring.hop, ring.hop_both, ring.kind) == (chip.network, chip.network, "DCN")
    assert ring.gather == wires_of(find_topology("v5e:16x16"), 256).gather  # half comes by 256 chips' parts at once
    assert ring.swap == pytest.approx(chip.network * 2)
    assert (pairs.gather, pairs.kind) == (pytest.approx(chip.network * 2), "DCN")
    assert within == wires_of(find_topology("v5e:16x16"), 256)
    assert wires_of(two, 16, stride=32).gather == pytest.approx(8 * chip.network * 2)
