"""What packed documents and unequal devices cost a ring, and what dealing by both gains; simulated, nothing is run.

  python -m scripts.figures documents --out docs/documents.png
  python -m scripts.figures documents --documents='data/*.jsonl' --seq_len 131072 --speeds "1 1 1 1 0.7 1 1 1"

A row is packed from documents as long as those of the files. Times are over those of devices that share all pairs in
proportion to their speeds, never wait and send nothing.
"""

import argparse
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from rich.table import Table

import ring_attention as ra
from ring_attention.checks import require_field
from ring_attention.commands.arguments import Parser, as_mistakes
from ring_attention.data.config import DataConfig
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.layouts import parse_speeds
from ring_attention.parallel.workload import Workload
from ring_attention.planning.balance import balance_of, hops_needed, work_by_hop
from ring_attention.planning.documents import DocumentLengths
from ring_attention.planning.simulator import simulate
from ring_attention.tables import show
from scripts.figures.simulate_ring import Passes, draw, machine_of, pairs_per_second

CASES = ("documents", "unequal devices", "both")


class Outcome(NamedTuple):
    """One layout of one case: how even it is, how far keys go, and what both passes take."""

    balance: float
    hops: tuple[int, int]
    passes: Passes
    sent: int


def run(args: argparse.Namespace, layout, segments: np.ndarray, speeds: list[float], counted: bool) -> Outcome:
    """Simulate both passes of a ring over one row."""
    P = len(speeds)
    pairs = work_by_hop(layout, args.seq_len, segment_ids=layout.permute(segments, 1))
    hops = hops_needed(pairs) if counted else None
    work = Workload(
        seq_len=args.seq_len,
        devices=P,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        layout="zigzag",
        segments=True,
        count_hops=counted,
        hops=hops,
    )
    machine, strategy = machine_of(args, speeds, blocking=False), ra.STRATEGIES["ring"]
    forth, back = (
        simulate(strategy, layout, work, machine, pairs=pairs, backward=backward) for backward in (False, True)
    )
    then = forth.seconds
    later = [dataclasses.replace(span, start=span.start + then, end=span.end + then) for span in back.spans]
    sent = strategy.sent_bytes(work) + strategy.sent_bytes(work, backward=True)
    passes = Passes(forth.spans + later, then + back.seconds)
    return Outcome(balance_of(pairs, speeds).total, hops or (P - 1, 0), passes, sent)


def outcomes(args: argparse.Namespace, lengths: np.ndarray) -> dict[tuple[str, str], Outcome]:
    """(case, layout) -> what comes out."""
    P = len(args.speeds)
    documents, one = np.repeat(np.arange(len(lengths)), lengths)[None], np.zeros((1, args.seq_len), int)
    found = {}
    for case in CASES:
        segments = one if case == CASES[1] else documents
        speeds = [1.0] * P if case == CASES[0] else args.speeds
        zigzag = ra.SequenceLayout("zigzag", P)
        found[case, "zigzag"] = run(args, zigzag, segments, speeds, counted=False)
        if case != CASES[1]:
            found[case, "zigzag, hops counted"] = run(args, zigzag, segments, speeds, counted=True)
        if case != CASES[0]:
            found[case, "for_speeds"] = run(args, ra.SequenceLayout.for_speeds(speeds), segments, speeds, counted=False)
        dealt: DealtRows = ra.SequenceLayout.for_documents(segments, P, speeds=None if case == CASES[0] else speeds)
        found[case, "for_documents"] = run(args, dealt, segments, speeds, counted=True)
    return found


def fair_seconds(args: argparse.Namespace, case: str, lengths: np.ndarray) -> float:
    """Seconds of both passes of devices that share all pairs by their speeds and never wait."""
    lengths = np.array([args.seq_len]) if case == CASES[1] else lengths
    speed = len(args.speeds) if case == CASES[0] else sum(args.speeds)
    pairs = float((lengths * (lengths + 1.0)).sum() / 2) * args.heads * 3.5
    return pairs / (speed * pairs_per_second(args))


def table_of(args: argparse.Namespace, lengths: np.ndarray, found: dict[tuple[str, str], Outcome]) -> Table:
    """Case x layout: balance, hops, bytes, time."""
    table = Table(
        title=f"A ring of {len(args.speeds)} devices, forward and backward: T={args.seq_len:,} H={args.heads} "
        f"K={args.kv_heads} D={args.head_dim}",
        caption=f"{len(lengths)} documents of {lengths.min():,} to {lengths.max():,} tokens; speeds {args.speed_words}"
        "; busiest: work / speed over the mean; time: over that of a fair share",
    )
    for name in ("", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("busiest", "hops", "MB sent", "ms", "time"):
        table.add_column(name, justify="right")
    for (case, layout), outcome in found.items():
        last = (case, layout) == [key for key in found if key[0] == case][-1]
        milliseconds = outcome.passes.seconds * 1e3
        time = outcome.passes.seconds / fair_seconds(args, case, lengths)
        hops = "+".join(str(hop) for hop in outcome.hops)
        cells = [f"{outcome.balance:.2f}", hops, f"{outcome.sent / 1e6:.0f}", f"{milliseconds:.1f}", f"{time:.2f}"]
        table.add_row(case if layout == "zigzag" else "", layout, *cells, end_section=last)
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--documents", default="python-stdlib", metavar="GLOBS", help="files, as data.paths names them")
    parser.add_argument("--row", type=int, default=0, help="which of the rows that are packed")
    parser.add_argument("--speeds", default="1 1 1 0.5 1 1 1 1", help="of the devices, where they are unequal")
    parser.add_argument("--seq_len", type=int, default=262144, metavar="T", help="tokens")
    parser.add_heads(heads=32, kv_heads=8, head_dim=128)
    parser.add_argument("--tflops", type=float, default=200, help="of attention, by a device of speed 1")
    parser.add_argument("--bandwidth", type=float, default=50, help="GB/s of a link")
    parser.add_argument("--latency", type=float, default=10, help="microseconds of a transfer")
    parser.add_out("draw documents, and both, before and after, into this file")
    args = parser.parse_args(argv)
    args.jitter, args.speed_words = 0.0, args.speeds
    return args


@as_mistakes(ValueError)
def main(argv: list[str]) -> None:
    """Simulate, print, draw."""
    args = parse(argv)
    args.speeds = parse_speeds(args.speeds)
    require_field(args.row >= 0, "row", args.row, "rows are counted from 0", "choose 0 or more")
    lengths = DocumentLengths.read(DataConfig(paths=args.documents), 2**15)
    row = next(itertools.islice(lengths.rows(args.seq_len), args.row, None))
    found = outcomes(args, row)
    show(table_of(args, row, found))
    if args.out:
        columns = []
        for case, words in ((CASES[0], "documents"), (CASES[2], "documents and unequal devices")):
            layouts = {"before, zigzag": "zigzag", "after, for_documents": "for_documents"}
            columns.append({f"{words}, {name}": found[case, layout].passes for name, layout in layouts.items()})
        draw(columns, len(args.speeds), args.out)
