"""The worked example of docs/problems.md: what a naive broadcast costs as commonly reckoned, and what is really sent.

python -m scripts.figures worked_example
python -m scripts.figures worked_example --seq_len 131072 --devices 64 --tflops 990
"""

import argparse
import dataclasses
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import find_kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.commands.arguments import Parser
from ring_attention.hardware.chips import GiB
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.strategies import STRATEGIES, find_strategy
from ring_attention.parallel.strategy import Context, Strategy
from ring_attention.parallel.ulysses import even_size
from ring_attention.parallel.workload import Workload
from ring_attention.tables import show


class Traffic(NamedTuple):
    """Bytes that a strategy sends in one forward pass.

    Attributes:
      sent: bytes that one device sends.
      total: bytes that all devices send.
      seconds: how long the bytes of one device take, at the bandwidth given.
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
    """Return what a strategy sends forward; `bandwidth` is that of one device, in bytes a second."""
    sent = find_strategy(strategy).sent_bytes(work)
    return Traffic(sent, sent * work.devices, sent / bandwidth)


def can_do(strategy: Strategy, work: Workload) -> bool:
    """Return whether the strategy can do the work at all: heads, lengths and masks fit."""
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
    """Seconds of a causal forward pass over all tokens, shared evenly by devices of so many operations a second."""
    pairs = work.seq_len * (work.seq_len + 1) / 2
    return 4 * work.batch * work.heads * work.head_dim * pairs / work.devices / flops


def worked_example(
    seq_len: int = 2**20, model_dim: int = 4096, devices: int = 8, bandwidth: float = 200 * GiB
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


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--seq_len", type=int, default=2**20, metavar="n", help="tokens")
    parser.add_argument("--model_dim", type=int, default=4096, metavar="d", help="a multiple of 128, the head dim")
    parser.add_argument("--devices", type=int, default=8, metavar="P")
    parser.add_argument("--bandwidth", type=float, default=200, help="GiB/s of a device")
    parser.add_argument("--tflops", type=float, default=400, help="of attention, by a device")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Print."""
    args = parse(argv)
    bandwidth = args.bandwidth * GiB
    reckoned = broadcast_bytes(args.seq_len, args.model_dim, args.devices)
    console = Console(highlight=False)
    console.print(
        f"As reckoned: n * d * P * 2 bytes = {reckoned / GiB:.0f} GiB, {reckoned / bandwidth:.2f} s at "
        f"{args.bandwidth:.0f} GiB/s."
    )
    table = Table(title=f"Forward pass of one layer, n={args.seq_len:,} d={args.model_dim} P={args.devices}, 2 bytes")
    for name in ("strategy", "a device sends", "all send", "seconds"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    example = worked_example(args.seq_len, args.model_dim, args.devices, bandwidth)
    for name, found in sorted(example.items(), key=lambda item: -item[1].sent if item[1] else 0):
        label = name if STRATEGIES[name].full else f"{name} (not full attention)"
        if found is None:
            table.add_row(f"{label}: cannot do it", "-", "-", "-")
            continue
        table.add_row(label, f"{found.sent / GiB:.2f} GiB", f"{found.total / GiB:.1f} GiB", f"{found.seconds:.3f}")
    show(table, console)
    heads = args.model_dim // 128
    work = Workload(seq_len=args.seq_len, devices=args.devices, heads=heads, kv_heads=heads, head_dim=128)
    seconds = attention_seconds(work, args.tflops * 1e12)
    console.print(f"Full causal attention itself: {seconds:.2f} s on each device at {args.tflops:.0f} TFLOP/s.")
