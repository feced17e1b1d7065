"""Speed of ring attention on simulated CPU devices, beside that of others on the same machine in the same run.

  pip install -e '.[benchmark]' torch  # the paper's own code and PyTorch, to compare with
  python -m scripts.benchmarks attention --out benchmarks/cpu

Systems take turns, in an order drawn anew for each round, so that a slow minute of the machine hits all of them; tables
show medians of useful GFLOP/s, in which causal attention counts half of all scores and a backward pass 2.5 forward
passes. All systems are checked to agree before any is timed. A second part times packed documents and a window against
the causal rate of the same layout. docs/benchmarks.md shows a run.
"""

import argparse
import importlib.metadata
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

import ring_attention as ra
from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.doctor.timing import seconds_in_turn
from ring_attention.json_files import write_json
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.tables import show
from ring_attention.testing import random_qkv
from scripts.benchmarks import baselines, timing
from scripts.benchmarks.baselines import DENSE, MATMUL, MATMUL_SIZE, PAPER, TORCH

PAPER_CHUNKS = (256, 512)
DENSE_BYTES = 4 * 2**30
"""JAX's dense attention holds several arrays of all scores; it is left out where one is larger than this."""
DOCUMENTS, WINDOW = 16, 1024


class Case(NamedTuple):
    """The sizes of one comparison."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"S={self.tokens} H={self.heads} K={self.kv_heads} D={self.head_dim}"

    def arrays(self) -> list[jax.Array]:
        """Random q, k, v and cotangent."""
        return random_qkv(0, 1, self.tokens, self.heads, self.kv_heads, self.head_dim)

    def flops(self, area: float, backward: bool) -> float:
        """Useful floating-point operations for `area` visible scores of each head."""
        return 4 * area * self.heads * self.head_dim * (3.5 if backward else 1)


CASES = (Case(8192, 8, 8, 64), Case(16384, 8, 2, 64))


def systems_of(args: argparse.Namespace, case: Case, mesh, backward: bool) -> list[baselines.System]:
    """Everything that can run here, ours first."""
    arrays, module = case.arrays(), baselines.load_paper()
    systems = [baselines.ours(f"ours, {kind}", kind, arrays, mesh, backward) for kind in LAYOUT_KINDS]
    if module is not None:
        chunks = [chunk for chunk in PAPER_CHUNKS if case.tokens // args.devices % chunk == 0]
        systems += [baselines.paper(module, chunk, arrays, mesh, backward) for chunk in chunks]
    if not backward and 4 * case.heads * case.tokens**2 <= DENSE_BYTES:
        systems += [baselines.dense(arrays, backward)]
    torch_system = baselines.pytorch(arrays, backward)
    return systems if torch_system is None else [*systems, torch_system]


def in_turn(args: argparse.Namespace, title: str, systems: list[baselines.System]) -> dict[str, float]:
    """Median seconds of each system, with a bar to watch."""
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=args.repeats * len(systems))
        clock = timing.CLOCKS[args.clock]
        return seconds_in_turn(systems, args.repeats, clock, lambda: bar.advance(task))


def measure(args: argparse.Namespace, case: Case, mesh, backward: bool) -> dict[str, float]:
    """Useful GFLOP/s of each system; of the paper's two chunk sizes the better one."""
    systems = systems_of(args, case, mesh, backward)
    timing.require_agreement(systems)
    matmul = baselines.matmul()
    matmul.run()
    seconds = in_turn(args, f"{case}, {'fwd+bwd' if backward else 'forward'}", [*systems, matmul])
    flops = dict.fromkeys(seconds, case.flops(case.tokens**2 / 2, backward)) | {MATMUL: 2 * MATMUL_SIZE**3}
    speeds = {name: flops[name] / seconds[name] / 1e9 for name in seconds}
    chunks = [speeds.pop(name) for name in list(speeds) if name.startswith(PAPER)]
    return speeds | ({PAPER: max(chunks)} if chunks else {})


def masks_of(tokens: int) -> dict[str, tuple[dict, float]]:
    """Name -> (mask arguments, visible scores of a head): causal, and what is compared with it."""
    even = np.repeat(np.arange(DOCUMENTS, dtype=np.int32), -(-tokens // DOCUMENTS))[None, :tokens]
    ends = np.sort(np.random.default_rng(0).choice(np.arange(1, tokens), DOCUMENTS - 1, replace=False))
    uneven = np.searchsorted(ends, np.arange(tokens), side="right")[None].astype(np.int32)

    def area(segment_ids) -> float:
        lengths = np.bincount(segment_ids[0])
        return float((lengths * (lengths + 1) / 2).sum())

    bound = dict(max_segment_len=int(np.bincount(even[0]).max()))
    return {
        "causal": ({}, tokens * (tokens + 1) / 2),
        f"{DOCUMENTS} equal documents": (dict(segment_ids=even), area(even)),
        f"{DOCUMENTS} equal documents, max_segment_len given": (dict(segment_ids=even) | bound, area(even)),
        f"{DOCUMENTS} documents of random lengths": (dict(segment_ids=uneven), area(uneven)),
        f"window={WINDOW}": (dict(window=WINDOW), tokens * WINDOW - WINDOW * (WINDOW - 1) / 2),
    }


def measure_masks(args: argparse.Namespace, case: Case, mesh, backward: bool) -> dict[str, dict[str, float]]:
    """Layout -> mask -> seconds, divided by those of its visible area at the layout's causal rate."""
    arrays, masks = case.arrays(), masks_of(case.tokens)
    names = {(kind, name): f"{kind}, {name}" for kind in LAYOUT_KINDS for name in masks}
    systems = [baselines.ours(names[key], key[0], arrays, mesh, backward, **masks[key[1]][0]) for key in names]
    for system in systems:
        system.run()
    seconds = in_turn(args, f"masks, {'fwd+bwd' if backward else 'forward'}", systems)
    per_score = {key: seconds[name] / masks[key[1]][1] for key, name in names.items()}
    return {
        kind: {name: per_score[kind, name] / per_score[kind, "causal"] for name in masks if name != "causal"}
        for kind in LAYOUT_KINDS
    }


def names_in_order(speeds: dict[str, float]) -> list[str]:
    """Ours, the paper's, the others, the matmul."""
    rank = {PAPER: 1, DENSE: 2, TORCH: 3, MATMUL: 4}
    return sorted(speeds, key=lambda name: rank.get(name, 0))


def remarks(case: Case, measured: dict[str, float]) -> dict[str, str]:
    """Return what to say of the systems that did not run."""
    missing = {
        PAPER: "pip install -e '.[benchmark]'",
        DENSE: f"its scores would take {4 * case.heads * case.tokens**2 / 2**30:.0f} GiB",
        TORCH: "pip install torch",
    }
    return {name: remark for name, remark in missing.items() if name not in measured}


def table_of(args: argparse.Namespace, case: Case, results: dict[str, dict[str, float]]) -> Table:
    """Speed, ratios to the paper's code and to PyTorch, and share of the matmul, for each direction."""
    table = Table(
        title=f"Useful GFLOP/s: {case} causal float32, {args.devices} simulated devices",
        caption=f"medians of {args.repeats} interleaved rounds on {os.cpu_count()} cores, {args.clock} time; x paper, "
        "x torch: times as fast as those",
    )
    table.add_column("system")
    for direction in results:
        for name in ("GFLOP/s", "x paper", "x torch", "of matmul"):
            table.add_column(f"{direction} {name}", justify="right")
    first = next(iter(results.values()))
    for system in names_in_order(first):
        cells = []
        for speeds in results.values():
            if system not in speeds:
                cells += ["not run", "", "", ""]
                continue
            ratios = [
                f"{speeds[system] / speeds[other]:.2f}" if other in speeds and system != MATMUL else ""
                for other in (PAPER, TORCH)
            ]
            cells += [f"{speeds[system]:.0f}", *ratios, f"{speeds[system] / speeds[MATMUL]:.0%}"]
        table.add_row(system, *cells)
    for system, remark in remarks(case, first).items():
        table.add_row(system, escape(remark), style="dim")
    return table


def table_of_masks(case: Case, results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Time over that of the visible area at the causal rate."""
    table = Table(title=f"Time / time of the visible area at the causal rate of the same layout: {case}")
    table.add_column("mask")
    for direction in results:
        for kind in LAYOUT_KINDS:
            table.add_column(f"{kind}\n{direction}", justify="right")
    for mask in next(iter(results.values()))[LAYOUT_KINDS[0]]:
        table.add_row(mask, *(f"{results[d][kind][mask]:.2f}" for d in results for kind in LAYOUT_KINDS))
    return table


def draw(args: argparse.Namespace, results: dict[Case, dict[str, dict[str, float]]], path: Path) -> None:
    """Bar charts, a row for each case and a column for each direction."""
    directions = list(next(iter(results.values())))
    size = (1.4 + 4 * len(directions), 0.6 + 2.9 * len(results))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(results), len(directions), squeeze=False, sharey="row")
    for row, (case, by_direction) in zip(panels, results.items(), strict=True):
        names = [name for name in names_in_order(by_direction["forward"]) if name != MATMUL]
        for panel, (direction, speeds) in zip(row, by_direction.items(), strict=True):
            colors = ["#1f6fb4" if name.startswith("ours") else "#b9bec6" for name in names]
            bars = panel.barh(names, [speeds.get(name, 0) for name in names], color=colors)
            labels = [f"{speeds[name]:.0f}" if name in speeds else "not run" for name in names]
            panel.bar_label(bars, labels=labels, padding=3)
            panel.axvline(speeds[MATMUL], color="#444444", linestyle=":", linewidth=1)
            panel.set_title(f"{direction}, {case}", loc="left", fontsize=10)
            panel.margins(x=0.12)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].invert_yaxis()
    figure.suptitle(f"Causal attention, float32, {os.cpu_count()} CPU cores: GFLOP/s (dotted: matmul)", fontsize=12)
    figure.savefig(path)


def versions() -> dict[str, str]:
    """Versions of what was compared; those that are installed."""
    found = {}
    for name in ("jax", "jaxlib", "ringattention", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--case",
        type=int,
        nargs=4,
        action="append",
        metavar=("S", "H", "K", "D"),
        help="tokens, query heads, key/value heads, head dim; may be repeated; by default "
        + " and ".join(" ".join(map(str, case)) for case in CASES),
    )
    parser.add_argument("--devices", type=int, default=8, metavar="P", help="simulated devices of the ring")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall", help="cpu: for a machine that others use too")
    parser.add_argument("--forward", action="store_true", help="leave out forward+backward")
    parser.add_argument("--no_masks", action="store_true", help="leave out packed documents and the window")
    parser.add_argument("--out", type=local_path, metavar="PATH", help="write PATH.json and a bar chart PATH.png")
    args = parser.parse_args(argv)
    args.case = tuple(Case(*sizes) for sizes in args.case) if args.case else CASES
    return args


def main(argv: list[str]) -> None:
    """Check, time, print, write."""
    args = parse(argv)
    simulate_devices(args.devices)
    mesh = ra.make_mesh(sp=args.devices, devices=jax.devices()[: args.devices])
    directions = {"forward": False} | ({} if args.forward else {"fwd+bwd": True})
    results, console = {}, Console(highlight=False)
    for case in args.case:
        results[case] = {name: measure(args, case, mesh, backward) for name, backward in directions.items()}
        show(table_of(args, case, results[case]), console)
    masks, last = {}, args.case[-1]
    if not args.no_masks:
        masks = {name: measure_masks(args, last, mesh, backward) for name, backward in directions.items()}
        show(table_of_masks(last, masks), console)
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    if args.out:
        settings = dict(devices=args.devices, repeats=args.repeats, clock=args.clock, cores=os.cpu_count())
        facts = {"settings": settings, "versions": versions()}
        facts["gflops"] = [{"case": case._asdict(), **by_direction} for case, by_direction in results.items()]
        facts["masks"] = {"case": last._asdict(), **masks}
        write_json(args.out.with_suffix(".json"), facts)
        draw(args, results, args.out.with_suffix(".png"))
