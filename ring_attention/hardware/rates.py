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

    @property
    def hop_back(self) -> float:
        """Bytes a second to the place before in a ring: those of a hop."""
        return self.hop


def wires_of(topology: Topology, group: int, stride: int = 1) -> Wires:
    """Find the wires among `group` devices of a mesh axis, which stand `stride` apart in the order of the mesh.

    TPU: a ring runs along a cycle of single links. An all-gather uses the links of all sides of the group's box, both
    ways where a side closes to a circle. In an all-to-all the middle of the longest side is the narrowest place.

    GPU: all of a host are one switch apart, or each has a link of its own to each other; then a hop has one link, and
    an all-gather and an all-to-all have as many as there are others.

    Across hosts of GPUs, and slices of TPUs, a ring of consecutive devices waits for the one that sends to the next
    host or slice, over its own part of the network; an all-gather and an all-to-all use all parts of the host or slice,
    each device for what it shares out inside.
    """
    chip, domain = topology.reached, topology.domain
    if group == 1 or group * stride <= domain:
        return _linked(topology, group)
    inside = max(domain // stride, 1)  # members of the group on one host, or in one slice
    outside = 1 - inside / max(group, inside)  # part of all bytes that comes from others
    local = _linked(topology, inside) if inside > 1 else None
    return Wires(
        hop=chip.network,
        hop_both=chip.network,
        gather=min(local.gather if local else math.inf, inside * chip.network / outside),
        swap=min(local.swap if local else math.inf, chip.network / outside),
        kind="DCN" if topology.tpu else "InfiniBand" if chip.links == 1 else "network",
        latency=topology.reach.network_latency,
    )


def _linked(topology: Topology, group: int) -> Wires:
    """Find the wires among devices that links join."""
    chip, latency = topology.reached, topology.reach.latency
    if topology.tpu:
        sides = [side for side in topology.box(group) if side > 1] or [1]
        ways = sum(2 if topology.wraps(side) else 1 for side in sides)
        narrow = max(side / (8 if topology.wraps(side) else 4) for side in sides)
        swap = chip.link / max(narrow, 0.5)
        gather = ways * chip.link
        return Wires(hop=chip.link, hop_both=2 * chip.link, gather=gather, swap=swap, kind="ICI", latency=latency)
    ways = max(min(group - 1, chip.links), 1)
    return Wires(
        hop=chip.link,
        hop_both=min(ways, 2) * chip.link,
        gather=ways * chip.link,
        swap=ways * chip.link,
        kind="NVLink" if chip.links == 1 else "Infinity Fabric",
        latency=latency,
    )
