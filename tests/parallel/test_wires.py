"""Rings on the wires of a pod: every hop one link wherever the grid has such a ring."""

import collections
import dataclasses
import itertools
import logging
import math

import numpy as np
import pytest
from jax.sharding import Mesh

from ring_attention.parallel.wires import Hops, arrange, blocks_of_a_link, has_cycle, hops_of, ring_in_box

AXES = ("dp", "fsdp", "sp", "tp")


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a jax.Device as says where it is."""

    coords: tuple[int, ...] | None
    slice_index: int | None = 0
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"


class Pod:
    """A mesh of chips, which jax.sharding.Mesh would not take."""

    axis_names = AXES

    def __init__(self, chips, **shape):
        self.devices = arrange(chips, tuple(shape.get(axis, 1) for axis in AXES))


def _grid(*sides, **others):
    return [Chip(coords, **others) for coords in itertools.product(*map(range, sides))]


def _links(x, y):
    return sum(abs(a - b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("sides", list(itertools.product(range(1, 6), range(1, 5), range(1, 5))), ids=str)
def test_ring_in_box_visits_every_place_once(sides):
    ring = ring_in_box(sides)
    assert len(ring) == len(set(ring)) == math.prod(sides)
    assert set(ring) == set(itertools.product(*map(range, sides)))
    longest = max(_links(x, y) for x, y in zip(ring, ring[1:] + ring[:1], strict=True))
    assert longest <= (1 if has_cycle(sides) else 2)


def _cycle_by_search(sides):
    """Whether a box has a Hamiltonian cycle, found by trying."""
    places = set(itertools.product(*map(range, sides)))
    start = (0,) * len(sides)

    def extend(path, seen):
        if len(path) == len(places):
            return _links(path[-1], start) == 1
        steps = (
            tuple(x + d * (i == axis) for i, x in enumerate(path[-1])) for axis in range(len(sides)) for d in (1, -1)
        )
        return any(extend([*path, place], seen | {place}) for place in steps if place in places and place not in seen)

    return len(places) <= 2 or extend([start], {start})


@pytest.mark.parametrize(
    "sides", [(1, 3), (1, 4), (2, 2), (2, 3), (3, 3), (3, 4), (1, 2), (2, 2, 2), (3, 3, 1), (3, 2, 2)]
)
def test_has_cycle_agrees_with_a_search(sides):
    assert has_cycle(sides) == _cycle_by_search(sides)


PODS = {
    "v5e:4x4": (4, 4, 1),
    "v5e:4x8": (4, 8, 1),
    "v6e:16x16": (16, 16, 1),
    "v4:8x8x8": (8, 8, 8),
    "v5p:8x8x16": (8, 8, 16),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("pod", PODS)
def test_arrange_makes_every_hop_one_link_on_powers_of_two(pod, tp):
    chips = _grid(*PODS[pod])
    size = len(chips) // tp
    for sp in (2**k for k in range(1, 11) if 2**k <= size):
        mesh = Pod(chips, fsdp=size // sp, sp=sp, tp=tp)
        assert hops_of(mesh) == Hops(links=1, crossings=0), sp
        assert collections.Counter(mesh.devices.flat) == collections.Counter(chips)
    listed = Pod(chips, sp=len(chips))
    listed.devices = np.array(chips, object).reshape(1, 1, -1, 1)
    assert hops_of(listed).links == sum(side - 1 for side in PODS[pod])  # the control: up to 30


def test_arrange_makes_tp_neighbours_where_rings_stay_cycles():
    mesh = Pod(_grid(4, 4, 2), sp=16, tp=2)
    assert hops_of(mesh, "sp").links == hops_of(mesh, "tp").links == 1


def test_arrange_needs_two_links_at_most_without_a_cycle():
    assert hops_of(Pod(_grid(3, 3, 1), sp=9)) == Hops(links=2, crossings=0)
    assert hops_of(Pod(_grid(1, 5, 1), sp=5)) == Hops(links=2, crossings=0)


def test_arrange_keeps_both_cores_of_a_chip_together():
    chips = [
        Chip(coords, core_on_chip=core) for coords in itertools.product(range(2), range(2), range(1)) for core in (0, 1)
    ]
    assert hops_of(Pod(chips, sp=8)).links == 1


def test_arrange_crosses_slices_as_seldom_as_can_be():
    chips = [chip for number in range(2) for chip in _grid(4, 4, 1, slice_index=number)]
    mixed = chips[::2] + chips[1::2]
    assert hops_of(Pod(mixed, dp=2, sp=16)) == Hops(links=1, crossings=0)
    assert hops_of(Pod(mixed, sp=32)).crossings == 2
    assert hops_of(Pod(mixed, sp=16, tp=2)).crossings == 2
    assert hops_of(Pod(mixed, dp=4, sp=8)) == Hops(links=1, crossings=0)


def test_arrange_keeps_gpus_of_a_host_together():
    places = [(number % 8, number % 4, 0) for number in range(32)]
    gpus = [Chip(place, None, place[1], platform="gpu") for place in places]
    hosts = [gpu.process_index for gpu in Pod(gpus, sp=32).devices.flat]
    assert hosts == sorted(hosts)
    assert hops_of(Pod(gpus, sp=32)) == Hops(links=0, crossings=0)
    alike = [Chip(None) for _ in range(8)]
    assert Pod(alike, dp=2, sp=2, tp=2).devices.ravel().tolist() == alike


def test_arrange_leaves_what_fits_no_box_and_says_so(caplog):
    chips = _grid(4, 4, 1)
    with caplog.at_level(logging.WARNING):
        mesh = Pod(chips[:15], sp=5, tp=3)
        assert mesh.devices.ravel().tolist() == chips[:15]
        assert "fill no box of the pod's grid" in caplog.text
        caplog.clear()
        slices = [chip for number in range(3) for chip in _grid(4, 4, 1, slice_index=number)]
        assert Pod(slices, sp=16, tp=3).devices.ravel().tolist() == slices  # three do not divide a slice
        assert "sp=16 and tp=3 do not divide a grid of (4, 4, 1, 1)" in caplog.text
        caplog.clear()
        assert hops_of(Pod(slices, dp=3, sp=16)) == Hops(links=1, crossings=0)
        assert hops_of(Pod(_grid(5, 6, 1), fsdp=3, sp=10)).links == 1
        assert caplog.text == ""


def test_hops_of_measures_a_real_mesh_too():
    import jax

    mesh = Mesh(np.array(jax.devices()).reshape(1, 1, 8, 1), AXES)
    assert hops_of(mesh) == Hops(links=0, crossings=0)


def test_blocks_of_a_link_are_one_along_the_cycle_and_add_up_off_it():
    torus, line = ((4, 4, 4), (True,) * 3), ((8, 4), (False, False))
    assert blocks_of_a_link(*torus, 1) == blocks_of_a_link(*line, 1) == 1
    assert 1 < blocks_of_a_link(*torus, 16) < 16  # the cycle has 16 links to there, the torus far fewer
    assert blocks_of_a_link((16, 16), (False, False), 16) > blocks_of_a_link((16, 16), (True, True), 16)
    assert blocks_of_a_link((8,), (False,), 4) == 4  # four of each half cross the middle, each way
