"""What strategies send for a case that nobody needs to run, and how long that takes beside the computation."""

import dataclasses
from typing import NamedTuple

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import find_kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.strategies import STRATEGIES, find_strategy
from ring_attention.parallel.strategy import Context, Strategy
from ring_attention.parallel.ulysses import even_size
from ring_attention.parallel.workload import Workload

GIB = 2**30


class Traffic(NamedTuple):
    """Of one forward pass.

    Attributes:
      sent: bytes that one device sends.
      total: bytes that all devices send.
      seconds: of one device's, at the bandwidth given.
    """

    sent: int
    total: int
    seconds: float


def broadcast_bytes(seq_len: int, model_dim: int, devices: int, itemsize: int = 2) -> int:
    """Bytes of a tensor [seq_len, model_dim] once for each device: how the naive broadcast is commonly reckoned.

    It counts one of K and V, and also the copy that each device has already; `traffic` counts both, and what is sent.
    """
    return seq_len * model_dim * devices * itemsize


def traffic(strategy: str | Strategy, work: Workload, bandwidth: float) -> Traffic:
    """What a strategy sends forward; `bandwidth` is that of one device, in bytes a second."""
    sent = find_strategy(strategy).sent_bytes(work)
    return Traffic(sent, sent * work.devices, sent / bandwidth)


def can_do(strategy: Strategy, work: Workload) -> bool:
    """Whether the strategy can do the work at all: heads, lengths and masks fit."""
    layout = SequenceLayout(work.layout, work.devices)
    context = Context(axis_name="sp", layout=layout, kernel=find_kernel("auto"), blocks=BlockSizes())
    shape = (work.batch, work.shard, work.heads, work.head_dim)
    try:
        layout.check_length(work.seq_len)
        strategy.check(context, shape, work.kv_heads, MaskSpec(scale=1.0, causal=work.causal, window=work.window))
    except ValueError:
        return False
    return True


def attention_seconds(work: Workload, flops: float) -> float:
    """Of a causal forward pass over all tokens, shared out evenly among devices of so many operations a second."""
    pairs = work.seq_len * (work.seq_len + 1) / 2
    return 4 * work.batch * work.heads * work.head_dim * pairs / work.devices / flops


def worked_example(
    seq_len: int = 2**20, model_dim: int = 4096, devices: int = 8, bandwidth: float = 200 * GIB
) -> dict[str, Traffic | None]:
    """Strategy -> Traffic, or None where it cannot be, for the example of docs/problems.md.

    Heads of 128, as many for keys and values as for queries, 2 bytes an element. The window is 4096 tokens; USP divides
    the devices as evenly as it can.
    """
    work = Workload(seq_len=seq_len, devices=devices, heads=model_dim // 128, kv_heads=model_dim // 128, head_dim=128)
    found = {}
    for name in STRATEGIES:
        if name != "single_device":
            case = work if name != "sliding_window" else dataclasses.replace(work, window=4096)
            options = dict(ulysses_size=even_size(devices)) if name == "usp" else {}
            strategy = find_strategy(name, options)
            found[name] = traffic(strategy, case, bandwidth) if can_do(strategy, case) else None
    return found
