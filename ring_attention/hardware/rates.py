"""The wires between the devices of a pod, and the bytes a second that each way of sending reaches on them."""

import dataclasses
import math

from ring_attention.hardware.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wires:
    """Bytes a second that one device of a group of neighbours sends, for each way of sending.

    Attributes:
      hop: to the next of a ring.
      hop_both: the same if half goes each way round.
      gather: that arrive in an all-gather, or leave in a reduce-scatter.
      swap: that leave in an all-to-all.
      kind: which wires they are.
      latency: seconds of a transfer beside its bytes.
    """

    hop: float
    hop_both: float
    gather: float
    swap: float
    kind: str
    latency: float = 0.0


def wires_of(topology: Topology, group: int, stride: int = 1) -> Wires:
    """Find the wires among `group` devices of a mesh axis, which stand `stride` apart in the order of the mesh.

    TPU: a ring runs along a cycle of single links. An all-gather uses the links of all sides of the group's box, both
    ways where a side closes to a circle. In an all-to-all the middle of the longest side is the narrowest place.

    GPU: all of a host are one switch apart, or each has a link of its own to each other; then a hop has one link, and
    an all-gather and an all-to-all have as many as there are others. Across hosts a ring of consecutive devices waits
    for the one that sends to the next host over its own adapter; an all-gather and an all-to-all use all adapters of
    the host, each device for the part that it shares out inside.
    """
    chip = topology.reached
    if topology.tpu:
        sides = [side for side in topology.box(group) if side > 1] or [1]
        ways = sum(2 if topology.wraps(side) else 1 for side in sides)
        narrow = max(side / (8 if topology.wraps(side) else 4) for side in sides)
        return Wires(
            hop=chip.link,
            hop_both=2 * chip.link,
            gather=ways * chip.link,
            swap=chip.link / max(narrow, 0.5),
            kind="ICI",
            latency=topology.reach.latency,
        )
    direct = chip.links > 1  # from each to each, with no switch between
    if not topology.crosses_hosts(group * stride):
        ways = max(min(group - 1, chip.links), 1)
        return Wires(
            hop=chip.link,
            hop_both=min(ways, 2) * chip.link,
            gather=ways * chip.link,
            swap=ways * chip.link,
            kind="Infinity Fabric" if direct else "NVLink",
            latency=topology.reach.latency,
        )
    inside = max(topology.sides[-1] // stride, 1)  # members of the group on one host
    local = min(inside - 1, chip.links) * chip.link if inside > 1 else math.inf
    hosts = math.ceil(group / inside)
    outside = (hosts - 1) / hosts  # part of all bytes that comes from other hosts
    return Wires(
        hop=chip.network,
        hop_both=chip.network,
        gather=min(local, inside * chip.network / outside),
        swap=min(local, chip.network / outside),
        kind="network" if direct else "InfiniBand",
        latency=topology.reach.network_latency,
    )
