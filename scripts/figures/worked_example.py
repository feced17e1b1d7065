"""The worked example of docs/problems.md: what a naive broadcast costs as commonly reckoned, and what is really sent.

python -m scripts.figures worked_example
python -m scripts.figures worked_example --seq_len 131072 --devices 64 --tflops 990
"""

import argparse

from rich.console import Console
from rich.table import Table

from ring_attention.commands.arguments import Parser
from ring_attention.parallel.strategies import STRATEGIES
from ring_attention.parallel.workload import Workload
from ring_attention.planning.traffic import GIB, attention_seconds, broadcast_bytes, worked_example
from ring_attention.tables import show


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
    bandwidth = args.bandwidth * GIB
    reckoned = broadcast_bytes(args.seq_len, args.model_dim, args.devices)
    console = Console(highlight=False)
    console.print(
        f"As reckoned: n * d * P * 2 bytes = {reckoned / GIB:.0f} GiB, {reckoned / bandwidth:.2f} s at "
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
        table.add_row(label, f"{found.sent / GIB:.2f} GiB", f"{found.total / GIB:.1f} GiB", f"{found.seconds:.3f}")
    show(table, console)
    heads = args.model_dim // 128
    work = Workload(seq_len=args.seq_len, devices=args.devices, heads=heads, kv_heads=heads, head_dim=128)
    seconds = attention_seconds(work, args.tflops * 1e12)
    console.print(f"Full causal attention itself: {seconds:.2f} s on each device at {args.tflops:.0f} TFLOP/s.")
