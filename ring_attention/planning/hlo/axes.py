"""Which axes of a mesh a collective of a compiled program goes along."""

import math

from ring_attention.checks import require
from ring_attention.planning.hlo.compiled import Collective

PERMUTE = "collective-permute"
BETWEEN_SLICES = "slices"


def axes_of(item: Collective, mesh_shape: dict[str, int]) -> str:
    """The mesh axes that a collective goes along, such as "sp" or "fsdp+sp"; "?" if it is none.

    They are those in which the places of a group's devices differ. A group must be the whole block of places that
    these allow: two devices across from each other are no axis. Part of an axis counts as that axis. The groups of a
    permute are the rings, or open chains, that its pairs form. "slices" is what goes between slices of TPUs.
    """
    if item.between_slices:
        return BETWEEN_SLICES
    devices = math.prod(mesh_shape.values())
    groups = _chains(item.groups) if item.kind == PERMUTE else item.groups
    members = [x for group in groups for x in group]
    stray = max(members, default=0)
    require(
        stray < devices,
        f"mesh_shape has {devices} devices, but {item.kind} {item.name} is for device {stray}; pass the shape of the "
        "mesh that the program was compiled for",
    )
    found = set()
    for group in groups:
        places = [place_of(device, mesh_shape) for device in group]
        extents = {axis: len({place[axis] for place in places}) for axis in mesh_shape}
        if math.prod(extents.values()) != len(group):
            return "?"
        found |= {axis for axis, extent in extents.items() if extent > 1}
    return "+".join(axis for axis in mesh_shape if axis in found) or "?"


def place_of(device: int, mesh_shape: dict[str, int]) -> dict[str, int]:
    """Find the place of a device: axis -> index along it."""
    place = {}
    for axis in reversed(mesh_shape):
        device, place[axis] = divmod(device, mesh_shape[axis])
    return place


def _chains(pairs: tuple[tuple[int, ...], ...]) -> list[set[int]]:
    """Join pairs of devices to the sets that they connect."""
    chains: list[set[int]] = []
    for pair in pairs:
        touching = [chain for chain in chains if chain & set(pair)]
        chains = [chain for chain in chains if not chain & set(pair)] + [set(pair).union(*touching)]
    return chains
