"""How many tokens a device must hold for a ring to compute longer than it sends.

Table 2 of the Ring Attention paper (Liu, Zaharia & Abbeel 2023), and the same with what it leaves out: grouped queries
send less, a causal mask computes less, and the backward pass sends gradients in float32 too.
"""

import dataclasses

from ring_attention.hardware.paper import PaperRow
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import pace_of, ring_wires


def tokens_to_hide(
    flops: float,
    bandwidth: float,
    *,
    queries_per_key: float = 1,
    causal: bool = False,
    backward: bool = False,
    itemsize: int = 2,
) -> float:
    """The tokens of a device from which on computing a hop takes as long as sending the next block.

    A hop of t queries and t keys takes 4 t^2 H D operations and 2 t K D elements; a causal mask in a balanced layout
    leaves half of the operations; backward there are 2.5 times as many, and dK and dV travel beside K and V in float32.

    Args:
      flops: operations a second of a device.
      bandwidth: bytes a second from a device to the next.
      queries_per_key: H/K, query heads to a key/value head.
      causal: whether half of the pairs are masked.
      backward: whether it is the backward pass.
      itemsize: bytes of an element of K and V.
    """
    sent = itemsize + 4 * backward
    operations = 2 * (2.5 if backward else 1) / (2 if causal else 1)
    return flops / bandwidth * sent / operations / queries_per_key


def paper_tokens(row: PaperRow) -> tuple[float, float]:
    """Thousands of tokens of a block and of a device by the paper's formula: flops / bandwidth, and six such blocks."""
    block = tokens_to_hide(row.flops, row.bandwidth) / 1e3
    return block, 6 * block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hiding:
    """The tokens that a device must hold so that a ring does not wait for its wires; see `tokens_to_hide`.

    Attributes:
      name: what is counted.
      at_peak: if the device computed at its published peak.
      at_pace: at the rate that its attention kernel reaches.
    """

    name: str
    at_peak: float
    at_pace: float


def hiding_of(share: Share) -> tuple[Hiding, ...]:
    """The tokens that a device must hold: as the paper computes, with grouped queries, a causal mask, both passes."""
    chip, pace = share.topology.chip, pace_of(share)
    hop = ring_wires(share).hop
    groups = share.model.num_heads / share.model.num_kv_heads
    forms = [
        ("no mask, one key/value head for each query head", {}),
        (f"grouped queries, {groups:g} to a key/value head", dict(queries_per_key=groups)),
        ("and a causal mask", dict(queries_per_key=groups, causal=True)),
        ("and the backward pass", dict(queries_per_key=groups, causal=True, backward=True)),
    ]
    return tuple(
        Hiding(
            name=name,
            at_peak=tokens_to_hide(chip.flops, hop, itemsize=share.itemsize, **form),
            at_pace=tokens_to_hide(
                pace.backward if form.get("backward") else pace.forward, hop, itemsize=share.itemsize, **form
            ),
        )
        for name, form in forms
    )
