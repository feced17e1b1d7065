"""Step times of layouts and strategies on devices that are not alike, simulated; nothing is run.

  python -m scripts.figures simulate_ring --speeds "1 1 1 0.5 1 1 1 1" --out docs/timeline.png
  python -m scripts.figures simulate_ring --speeds "1 1 1 1" --jitter 0.2 --bandwidth 25

A speed of 1 computes --tflops. Times are over those of devices that share all work in proportion to their speeds and
never wait. scripts/benchmarks/stragglers.py checks the simulator against a real run.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.table import Table

import ring_attention as ra
from ring_attention.checks import require_field
from ring_attention.commands.arguments import Parser, as_mistakes
from ring_attention.parallel.layouts import LAYOUT_KINDS, parse_speeds
from ring_attention.parallel.strategies import find_strategy
from ring_attention.parallel.ulysses import even_size
from ring_attention.parallel.workload import Workload
from ring_attention.planning.simulator import Machine, Span, Timeline, seconds_of_both_passes, simulate
from ring_attention.tables import show

TRIALS = 5
"""Runs with jitter, of which the mean counts."""

COMPARED = ("ring", "all_gather", "ulysses", "usp")

COLORS = {"hop 0": "#0b3c6f", "hop": "#1f6fb4", "keys": "#9aa3ad", "gradients": "#d97706"}


class Passes(NamedTuple):
    """What devices and links did in several passes, one after the other, and until when; see `Timeline`."""

    spans: list[Span]
    seconds: float


def pairs_per_second(args: argparse.Namespace) -> float:
    """Return the pairs of a query and a key, each 4 * head_dim operations, that speed 1 computes in a second."""
    return args.tflops * 1e12 / (4 * args.head_dim)


def machine_of(args: argparse.Namespace, speeds: list[float], blocking: bool) -> Machine:
    """Devices and links as the flags say."""
    return Machine.of_speeds(
        [speed * pairs_per_second(args) for speed in speeds],
        bandwidth=args.bandwidth * 1e9,
        latency=args.latency * 1e-6,
        blocking=blocking,
        jitter=args.jitter,
    )


def table_of(args: argparse.Namespace, speeds: list[float], work: Workload, layouts: dict) -> Table:
    """Strategy x layout, transfers beside the computation and blocking it."""
    one = Machine.of_speeds([sum(speeds) * pairs_per_second(args)])
    alone, layout_of_one = dataclasses.replace(work, devices=1), ra.SequenceLayout("contiguous", 1)
    fair = seconds_of_both_passes("ring", layout_of_one, alone, one)
    table = Table(
        title=f"Forward and backward, T={args.seq_len:,} H={args.heads} K={args.kv_heads} D={args.head_dim}, "
        f"speeds {args.speeds}",
        caption=f"time over a fair share, {fair * 1e3:.1f} ms; beside: transfers run beside the computation; blocking: "
        "they do not",
    )
    table.add_column("strategy", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    for name in ("beside", "blocking"):
        table.add_column(name, justify="right")
    size = even_size(len(speeds))
    for strategy in COMPARED:
        chosen = find_strategy(strategy, {"ulysses_size": size} if strategy == "usp" else {})
        for name, layout in layouts.items():
            cells = []
            for blocking in (False, True):
                machine = machine_of(args, speeds, blocking)
                try:
                    trials = [
                        seconds_of_both_passes(chosen, layout, work, machine, seed=seed)
                        for seed in range(TRIALS if args.jitter else 1)
                    ]
                    cells.append(f"{statistics.mean(trials) / fair:.2f}")
                except ValueError:  # a layout that cannot be merged, or too few heads
                    cells.append("-")
            label = f"{strategy} {size}x{len(speeds) // size}" if strategy == "usp" else strategy
            table.add_row(label, name, *cells, end_section=name == list(layouts)[-1])
    return table


def draw(timelines: list[dict[str, Timeline | Passes]], devices: int, path: Path) -> None:
    """Draw what each device and its link did, in columns of panels that each have a title."""
    rows, columns = len(timelines[0]), len(timelines)
    figure = Figure(figsize=(13, 1 + 0.28 * devices * rows), dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey=True).T
    for panels, column in zip(grid, timelines, strict=True):
        for panel, (title, timeline) in zip(panels, column.items(), strict=True):
            for span in timeline.spans:
                kind, device = span.resource.split()
                color = COLORS.get(span.name) or COLORS[span.name.split()[0]]
                row, height = int(device) + (0.0 if kind == "device" else 0.4), 0.54 if kind == "device" else 0.2
                width = (span.end - span.start) * 1e3
                panel.barh(row, width, height, left=span.start * 1e3, color=color, edgecolor="white", linewidth=0.4)
            panel.set_title(f"{title}: {timeline.seconds * 1e3:.0f} ms", loc="left", fontsize=11)
            panel.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("ms")
    grid[0, 0].set_yticks(range(devices), [f"device {i}" for i in range(devices)], fontsize=9)
    grid[0, 0].invert_yaxis()
    figure.suptitle(
        "Dark: the device's own keys. Blue: a hop. Below, on its link: keys and values (grey), gradients (orange).",
        fontsize=11,
    )
    figure.savefig(path)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--speeds", default="1 1 1 0.5 1 1 1 1", help="of the devices along the ring")
    parser.add_argument("--seq_len", type=int, default=131072, metavar="T", help="tokens")
    parser.add_heads(heads=32, kv_heads=8, head_dim=128)
    parser.add_argument("--tflops", type=float, default=200, help="of attention, by a device of speed 1")
    parser.add_argument("--bandwidth", type=float, default=50, help="GB/s of a link")
    parser.add_argument("--latency", type=float, default=10, help="microseconds of a transfer")
    parser.add_argument("--jitter", type=float, default=0, help="standard deviation of the logarithm of a hop's time")
    parser.add_argument("--chunks", type=int, default=16, help="chunks of a shard in the layout for speeds")
    parser.add_out("draw the forward and backward pass of a ring into this file")
    return parser.parse_args(argv)


@as_mistakes(ValueError)
def main(argv: list[str]) -> None:
    """Simulate, print, draw."""
    args = parse(argv)
    speeds = parse_speeds(args.speeds)
    P = len(speeds)
    layouts = {kind: ra.SequenceLayout(kind, P) for kind in LAYOUT_KINDS}
    layouts["for_speeds"] = ra.SequenceLayout.for_speeds(speeds, args.chunks)
    work = Workload(seq_len=args.seq_len, devices=P, heads=args.heads, kv_heads=args.kv_heads, head_dim=args.head_dim)
    need = [layout.padded_length(args.seq_len) for layout in layouts.values()]
    remedy = f"use a multiple, for example {max(need)}"
    require_field(max(need) == args.seq_len, "seq_len", args.seq_len, "all layouts must divide it", remedy)
    show(table_of(args, speeds, work, layouts))
    if args.out:
        machine = machine_of(args, speeds, blocking=False)
        columns = []
        for name, backward in (("forward", False), ("backward", True)):
            column = {
                layout: simulate("ring", layouts[layout], work, machine, backward=backward)
                for layout in ("zigzag", "for_speeds")
            }
            columns.append({f"{layout}, {name}": timeline for layout, timeline in column.items()})
        draw(columns, P, args.out)
