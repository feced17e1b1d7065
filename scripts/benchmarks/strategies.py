"""Every strategy on the same attention: memory and bytes as compiled, how they grow, errors, a leak probe, and time.

  python -m scripts.benchmarks strategies --out benchmarks/strategies
  python -m scripts.benchmarks strategies --seq_len 16384 --heads 8 --kv_heads 2 --dtype bfloat16

Memory and bytes are read from programs compiled for simulated devices; exponents are fitted over three lengths and
over rings of up to --devices. docs/problems.md shows a run and says where it contradicts what is commonly claimed.
"""

import argparse
import dataclasses
import functools
import os
import time
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

import ring_attention as ra
from ring_attention import testing
from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.doctor.timing import seconds_in_turn
from ring_attention.json_files import write_json
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.parallel.strategies import find_strategy
from ring_attention.planning.hlo import compiled
from ring_attention.tables import show
from scripts.benchmarks import baselines
from scripts.benchmarks.approaches import APPROACHES, Approach, Cost, Row

CHECKED_TOKENS = 1024
"""Length at which results are compared with the float64 oracle, which holds all scores."""


class Bench:
    """The attention that all approaches compute."""

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def attend(self, approach: Approach, devices: int):
        """(attention over arrays in the layout's order, the mesh, the layout)."""
        devices = 1 if approach.strategy == "single_device" else devices
        mesh = ra.make_mesh(sp=devices, devices=jax.devices()[:devices])
        layout = ra.SequenceLayout(self.args.layout, devices)
        mask = dict(window=self.args.window) if approach.window else {}
        settings = dict(mesh=mesh, layout=layout, strategy=approach.strategy, **mask)
        settings |= approach.options_for(devices)
        return functools.partial(ra.context_attention, **settings), mesh, layout

    def cost(self, approach: Approach, tokens: int, devices: int, backward: bool = False) -> Cost:
        """Compile and read."""
        args = self.args
        attend, mesh, _ = self.attend(approach, devices)
        sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))
        q, kv = (
            jax.ShapeDtypeStruct((args.batch, tokens, heads, args.head_dim), args.dtype, sharding=sharding)
            for heads in (args.heads, args.kv_heads)
        )
        executable = baselines.with_gradients(attend, backward).lower(q, kv, kv, q).compile()
        memory = executable.memory_analysis().temp_size_in_bytes
        return Cost(memory=memory, sent=compiled.sent(executable.as_text()))

    def check(self, approach: Approach, row: Row) -> None:
        """Compare with the oracle, and change later tokens."""
        args, tokens = self.args, min(self.args.seq_len, CHECKED_TOKENS)
        attend, mesh, layout = self.attend(approach, args.devices)
        q, k, v, dout = testing.random_qkv(0, args.batch, tokens, args.heads, args.kv_heads, args.head_dim, args.dtype)
        mask = dict(window=args.window) if approach.window else {}
        if approach.strategy == "sparse":
            mask["stride"] = find_strategy("sparse", approach.options).stride_of(tokens)
        sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))

        def run(*arrays):
            dealt = (jax.device_put(layout.permute(x, axis=1), sharding) for x in arrays)
            return [layout.unpermute(np.asarray(x), axis=1) for x in testing.out_and_gradients(attend, *dealt)]

        got, want = run(q, k, v, dout), testing.oracle(q, k, v, dout, **mask)
        dense = testing.out_and_gradients(lambda *qkv: testing.dense_attention(*qkv, **mask), q, k, v, dout)
        pairs = zip(testing.errors(got, want), testing.errors(dense, want), strict=True)
        row.error = max(error / bound for error, bound in pairs)
        row.from_full = testing.relative_error(got[0], ra.reference_attention(q, k, v))
        half = tokens // 2
        later = run(q, k.at[:, half:].add(1), v.at[:, half:].add(1), dout)
        row.leak = float(np.abs(np.asarray(later[0] - got[0], np.float64))[:, :half].max())

    def system(self, approach: Approach) -> baselines.System:
        """Forward and backward, to be timed."""
        args = self.args
        attend, mesh, layout = self.attend(approach, args.devices)
        arrays = testing.random_qkv(0, args.batch, args.seq_len, args.heads, args.kv_heads, args.head_dim, args.dtype)
        sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))
        dealt = [jax.device_put(layout.permute(x, axis=1), sharding) for x in arrays]
        return baselines.jax_system(approach.label, attend, dealt, backward=True)


def measure(args: argparse.Namespace) -> dict[str, Row]:
    """Label -> Row."""
    bench, n, P = Bench(args), args.seq_len, args.devices
    lengths = [n // 4, n // 2, n]
    rings = [size for size in (2, 4, 8, 16, 32, 64) if size < P] + [P]
    rows, systems = {}, []
    steps = len(APPROACHES) * (len(lengths) + len(rings) + 2) + len(APPROACHES) * (args.repeats + 1)
    with Progress(transient=True) as progress:
        task = progress.add_task("compile", total=steps)

        def done(approach: Approach, what: str) -> None:
            progress.update(task, advance=1, description=f"{what}: {approach.label}")

        for approach in APPROACHES:
            row = Row(by_length={}, by_devices={})
            for tokens in lengths:
                row.by_length[tokens] = bench.cost(approach, tokens, P)
                done(approach, "compile")
            for devices in rings if approach.strategy != "single_device" else [1]:
                at_hand = devices == P
                row.by_devices[devices] = row.by_length[n] if at_hand else bench.cost(approach, n, devices)
                done(approach, "compile")
            row.training = bench.cost(approach, n, P, backward=True)
            done(approach, "compile")
            bench.check(approach, row)
            done(approach, "check")
            systems.append(bench.system(approach))
            systems[-1].run()
            done(approach, "warm up")
            rows[approach.label] = row
        advance = lambda: progress.update(task, advance=1, description="time")  # noqa: E731
        seconds = seconds_in_turn(systems, args.repeats, time.perf_counter, advance)
    for label, row in rows.items():
        row.seconds = seconds[label]
    return rows


def in_power(exponent: float | None) -> str:
    """For a cell."""
    return "-" if exponent is None else f"{exponent:.1f}"


def table_of(args: argparse.Namespace, rows: dict[str, Row]) -> Table:
    """Return the rows as a table."""
    title = (
        f"n={args.seq_len} tokens, P={args.devices} devices, B={args.batch} H={args.heads} K={args.kv_heads} "
        f"D={args.head_dim} {args.dtype}, causal, {args.layout}, window {args.window} where there is one"
    )
    caption = (
        "per device, forward; n^, P^: fitted exponents; +bwd: with the backward pass; error: worst of out, dq, dk, dv, "
        "1 = dense in the same dtype; far: relative difference from full attention; leak: change by later tokens"
    )
    table = Table(title=title, caption=caption)
    table.add_column("approach", no_wrap=True)
    for of in ("memory", "sends"):
        for name in (of, f"{of} MiB", f"{of} n^", f"{of} P^", f"{of} +bwd"):
            table.add_column(name, justify="right")
    for name in ("error", "far", "leak", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for approach in APPROACHES:
        row = rows[approach.label]
        cells = [approach.label]
        for claim, of in zip(approach.claim, ("memory", "sent"), strict=True):
            exponents = (in_power(row.exponent(over, of)) for over in ("length", "devices"))
            training = getattr(row.training, of)
            cells += [claim, f"{getattr(row.forward, of) / 2**20:.2f}", *exponents, f"{training / 2**20:.2f}"]
        leak = "none" if row.leak == 0 else f"{row.leak:.1e}"
        table.add_row(*cells, f"{row.error:.2f}", f"{row.from_full:.0e}", leak, f"{row.seconds:.2f}")
    return table


STYLES = {
    "naive broadcast": ("#d62728", (0, (6, 6))),
    "all-gather by heads": ("#ff7f0e", (6, (6, 6))),
    "sparse": ("#8c564b", "-"),
    "sliding window": ("#bcbd22", "-"),
    "ring self-attention": ("#9467bd", (0, (1, 2))),
    "ring": ("#1f6fb4", "-"),
    "Ulysses": ("#2ca02c", "-"),
    "USP": ("#17becf", "-"),
}
"""Colour and dashes of a line; those that send alike lie on top of each other, on the broad one of the ring."""


def draw(args: argparse.Namespace, rows: dict[str, Row], path: Path) -> None:
    """Memory and bytes of one device against the number of devices."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    of_single = next(iter(rows["single device"].by_devices.values()))
    panels = {"memory": "Temporary memory of a device, MiB", "sent": "Sent by a device, MiB"}
    for panel, (of, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for label, (color, dashes) in STYLES.items():
            points = [(devices, getattr(cost, of) / 2**20) for devices, cost in rows[label].by_devices.items()]
            broad = dict(linewidth=7, alpha=0.4, zorder=1) if label == "ring" else dict(linewidth=1.8, marker="o")
            panel.plot(*zip(*points, strict=True), label=label, color=color, linestyle=dashes, markersize=4, **broad)
        if of == "memory":
            panel.axhline(of_single.memory / 2**20, color="#777777", linestyle=":", linewidth=1, label="single device")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xticks(list(rows["ring"].by_devices), [str(devices) for devices in rows["ring"].by_devices])
        panel.set_xlabel("devices P")
        panel.set_title(title, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, handlelength=3)
    figure.suptitle(f"Forward pass, {args.seq_len} tokens, H={args.heads} K={args.kv_heads} D={args.head_dim}")
    figure.savefig(path)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--seq_len", type=int, default=4096, metavar="n", help="tokens")
    parser.add_argument("--devices", type=int, default=8, metavar="P", help="simulated devices")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_heads(heads=8, kv_heads=8, head_dim=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layout", choices=["contiguous", "zigzag"], default="zigzag")
    parser.add_argument("--window", type=int, default=256, metavar="W", help="of the sliding window")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timing; the median counts")
    parser.add_argument("--out", type=local_path, metavar="PATH", help="write PATH.json and a figure PATH.png")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    args = parse(argv)
    simulate_devices(args.devices)
    rows = measure(args)
    show(table_of(args, rows))
    if args.out:
        facts = {"settings": vars(args) | dict(out=None, cores=os.cpu_count(), jax=jax.__version__)}
        facts["approaches"] = {label: dataclasses.asdict(row) for label, row in rows.items()}
        write_json(args.out.with_suffix(".json"), facts)
        draw(args, rows, args.out.with_suffix(".png"))
