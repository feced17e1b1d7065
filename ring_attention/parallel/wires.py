"""The places of a mesh's devices on a pod's wires, so that every hop of a ring is one link.

TPU chips stand in a grid and are wired to their neighbours. A ring along the order in which JAX lists them has hops of
up to dozens of links, which share their links with others, and the compiler for some chips then makes transfers that
overlap with nothing. So the grid is cut into boxes of one ring each, and in its box a ring follows a Hamiltonian cycle.
"""

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

_log = logging.getLogger(__name__)


class Hops(NamedTuple):
    """How far a mesh axis reaches from each device to the next, and from the last to the first.

    Attributes:
      links: of the longest hop within a slice, over the grid's own links; 0 where devices have no coordinates. A torus
        has more links, so that a hop may be shorter, and never longer.
      crossings: hops from one slice to another, of the ring that has the most.
    """

    links: int
    crossings: int


def hops_of(mesh: Mesh, axis_name: str = "sp") -> Hops:
    """How far the hops of a mesh axis are."""
    axis = mesh.axis_names.index(axis_name)
    rings = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis])
    found = [_hops_of_ring(list(ring)) for ring in rings]
    return Hops(max(hops.links for hops in found), max(hops.crossings for hops in found))


def _hops_of_ring(ring: Sequence[jax.Device]) -> Hops:
    links = crossings = 0
    for device, following in zip(ring, [*ring[1:], ring[0]], strict=True):
        here, there = _place(device), _place(following)
        if _slice_of(device) != _slice_of(following):
            crossings += 1
        elif here is not None and there is not None:
            links = max(links, sum(abs(a - b) for a, b in zip(here, there, strict=True)))
    return Hops(links, crossings)


def arrange(devices: Sequence[jax.Device], shape: tuple[int, int, int, int]) -> np.ndarray:
    """The devices as an array [dp, fsdp, sp, tp].

    Where they have coordinates, each ring along sp lies in a box of the grid, on a Hamiltonian cycle if its sides allow
    one, and otherwise so that no hop is longer than two links. Devices along tp are neighbours where that leaves the
    ring its cycle. Several slices are filled one after the other; a ring longer than a slice passes each of its slices
    once. Devices without coordinates stay in order, but those of a host together.

    Args:
      devices: as many as `shape` has.
      shape: sizes of dp, fsdp, sp and tp.
    """
    devices = sorted(devices, key=lambda device: (_slice_of(device), device.process_index))  # stable
    if _place(devices[0]) is None:
        return _as_array(devices).reshape(shape)
    (dp, fsdp, sp, tp), slices = shape, _group(devices, _slice_of)
    grids = [grid for members in slices if (grid := _grid(members)) is not None]
    size = len(slices[0])
    if len(grids) < len(slices) or any(grid.shape != grids[0].shape for grid in grids):
        _log.warning("the devices fill no box of the pod's grid: rings follow the order in which they are listed")
        return _as_array(devices).reshape(shape)
    within = (sp * tp <= size and size % (sp * tp) == 0) or len(slices) == 1
    ring = sp if within else size // tp
    parts = [part for grid in grids if (part := _arrange_box(grid, ring, tp)) is not None]
    if len(parts) < len(grids):
        _log.warning("sp=%d and tp=%d do not divide a grid of %s: rings follow its order", sp, tp, grids[0].shape)
        return _as_array(devices).reshape(shape)
    # [slices * boxes, ring, tp]; a ring over several slices takes them one after the other
    return np.concatenate(parts).reshape(dp * fsdp, sp, tp).reshape(shape)


def _slice_of(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _place(device: jax.Device) -> tuple[int, ...] | None:
    """Coordinates in the grid of a TPU, the core on the chip last; None elsewhere, for a GPU's say nothing of wires."""
    coords = getattr(device, "coords", None) if device.platform == "tpu" else None
    return None if coords is None else (*coords, getattr(device, "core_on_chip", 0))


def _group(devices: Sequence[jax.Device], key) -> list[list[jax.Device]]:
    return [list(members) for _, members in itertools.groupby(devices, key)]


def _as_array(devices: Sequence[jax.Device]) -> np.ndarray:
    array = np.empty(len(devices), object)
    array[:] = devices
    return array


def _grid(devices: Sequence[jax.Device]) -> np.ndarray | None:
    """The devices by their coordinates, or None if they fill no box."""
    places = np.array([_place(device) for device in devices])
    places -= places.min(0)
    grid = np.full(places.max(0) + 1, None, object)
    for device, place in zip(devices, places, strict=True):
        grid[tuple(place)] = device
    return grid if grid.size == len(devices) and all(device is not None for device in grid.flat) else None


@functools.cache
def blocks_of_a_link(sides: tuple[int, ...], wraps: tuple[bool, ...], shift: int) -> int:
    """How many blocks the busiest link carries when each device of a ring sends one to the `shift`th after it.

    The ring is that of `ring_in_box(sides)`. A block goes along one side of the box after the other, the shorter way
    round where a side `wraps`.
    """
    here = np.array(ring_in_box(sides))
    there, busiest = np.roll(here, -shift, 0), 0
    for axis, side in enumerate(sides):
        way = there[:, axis] - here[:, axis]
        if wraps[axis]:
            way = (way + side // 2) % side - side // 2
        loads = np.zeros((*sides, 2), int)
        at, links = here.copy(), np.abs(way)
        for link in range(links.max(initial=0)):
            going = links > link
            np.add.at(loads, (*at[going].T, (way[going] > 0).astype(int)), 1)
            at[going, axis] = (at[going, axis] + np.sign(way[going])) % side
        busiest, here = max(busiest, int(loads.max())), at
    return busiest


class _Cut(NamedTuple):
    """How a side of the grid is cut: its length is the product."""

    boxes: int
    tp: int
    ring: int


def _arrange_box(grid: np.ndarray, ring: int, tp: int) -> np.ndarray | None:
    """[boxes, ring, tp] of a grid, by its best cut; None if there is no cut."""
    cuts = min(_all_cuts(grid.shape, ring, tp), key=_cost, default=None)
    if cuts is None:
        return None
    axes = range(0, 3 * grid.ndim, 3)
    by_cut = grid.reshape([size for cut in cuts for size in cut])
    by_cut = by_cut.transpose([*axes, *(axis + 2 for axis in axes), *(axis + 1 for axis in axes)])
    sides = tuple(cut.ring for cut in cuts)
    order = np.ravel_multi_index(np.array(ring_in_box(sides)).T, sides)
    return by_cut.reshape(-1, ring, tp)[:, order]


def _all_cuts(shape: tuple[int, ...], ring: int, tp: int) -> Iterator[tuple[_Cut, ...]]:
    """Every way of cutting all sides that gives rings of `ring` devices, with `tp` of them side by side."""
    if not shape:
        if ring == tp == 1:
            yield ()
        return
    for of_ring, of_tp in itertools.product(_divisors(math.gcd(shape[0], ring)), _divisors(math.gcd(shape[0], tp))):
        if shape[0] % (of_ring * of_tp) == 0:
            cut = _Cut(shape[0] // (of_ring * of_tp), of_tp, of_ring)
            for rest in _all_cuts(shape[1:], ring // of_ring, tp // of_tp):
                yield (cut, *rest)


def _cost(cuts: tuple[_Cut, ...]) -> tuple[int, int, int]:
    """Smaller is better: the longest hop of the ring, how far tp reaches, and how far the box is from a cube."""
    sides = tuple(cut.ring for cut in cuts)
    return 2 - has_cycle(sides), sum(cut.ring * (cut.tp - 1) for cut in cuts), max(sides)


def has_cycle(sides: tuple[int, ...]) -> bool:
    """Whether a box of a grid has a Hamiltonian cycle, or needs none.

    Colour the box like a chessboard: a cycle changes colour at every link, so it needs as many devices of each; and on
    a line of more than two there is no way back.
    """
    long = [side for side in sides if side > 1]
    return math.prod(sides) <= 2 or (len(long) > 1 and math.prod(long) % 2 == 0)


@functools.cache
def ring_in_box(sides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """All places of a box in the order of a ring: each a link from the next if there is a cycle, else two at most."""
    if not has_cycle(sides):
        path = _path(sides)
        return tuple(path[::2] + path[::-1][len(path) % 2 :: 2])  # 0, 2, 4, ... and back 5, 3, 1
    if math.prod(sides) <= 2:
        return tuple(_path(sides))
    rows = next(axis for axis, side in enumerate(sides) if side % 2 == 0)  # one is even, as their product is
    others = tuple(1 if axis == rows else side for axis, side in enumerate(sides))
    columns = _path(others)  # each a link from the next: the box is a sheet, folded
    at = lambda row, column: tuple(row if axis == rows else x for axis, x in enumerate(columns[column]))  # noqa: E731
    cycle = [at(0, column) for column in range(len(columns))]
    for row in range(1, sides[rows]):
        inner = range(1, len(columns))
        cycle += [at(row, column) for column in (reversed(inner) if row % 2 else inner)]
    return tuple(cycle + [at(row, 0) for row in range(sides[rows] - 1, 0, -1)])


def _path(sides: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All places of a box, each a link from the next: there and back along the last side, and so on."""
    if not sides:
        return [()]
    path = []
    for number, head in enumerate(_path(sides[:-1])):
        line = range(sides[-1])
        path += [(*head, last) for last in (reversed(line) if number % 2 else line)]
    return path


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
