"""Packed documents on a ring of simulated CPU devices, zigzag beside dealt by documents: time, balance, bytes sent.

  python -m scripts.benchmarks documents --out benchmarks/documents.json

Time is that of each batch over the time of its visible area at the causal rate, which zigzag reaches on one document; 1
is perfect. Layouts and documents take turns, in an order drawn anew for each round, and both clocks are read around
each run: the wall's, and the CPU time of all threads, which leaves out waiting for cores that others use. Before any is
timed, the results of both layouts are checked to agree. One compiled program serves all documents of a layout, tables
and segment ids being its arguments.
"""

import argparse
import functools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import ring_attention as ra
from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.doctor.timing import System
from ring_attention.json_files import write_json
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.parallel.workload import Workload
from ring_attention.planning.balance import balance_of, hops_needed, work_by_hop
from ring_attention.tables import show
from ring_attention.testing import random_qkv
from scripts.benchmarks import timing

CAUSAL = "one document"
COLUMNS = ("wall", "CPU")


class Batch(NamedTuple):
    """A row of packed documents in one layout.

    Attributes:
      documents: what they are called.
      layout: what it is called.
      order: the layout.
      segments: int32 [1, S], in natural order.
    """

    documents: str
    layout: str
    order: SequenceLayout | DealtRows
    segments: np.ndarray

    @property
    def name(self) -> str:
        """Documents and layout."""
        return f"{self.documents}, {self.layout}"

    @property
    def work(self) -> np.ndarray:
        """Visible pairs, int64 [P, P], by device and hop."""
        return work_by_hop(self.order, self.segments.shape[1], segment_ids=self.order.permute(self.segments, 1))


def documents_of(tokens: int, number: int) -> dict[str, np.ndarray]:
    """Name -> lengths of the documents of a row; the same each time."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice(np.arange(1, tokens), number - 1, replace=False))
    powers = np.floor(64 * (1 + rng.pareto(1.0, tokens // 64))).astype(np.int64)
    short = powers[: np.searchsorted(np.cumsum(powers), tokens)]
    equal = np.diff(np.arange(number + 1) * tokens // number)
    return {
        CAUSAL: np.array([tokens]),
        f"{number} equal documents": equal,
        f"{number} of random lengths": np.diff(ends, prepend=0, append=tokens),
        f"{len(short) + 1} of power-law lengths": np.append(short, tokens - short.sum()),
    }


def batches_of(args: argparse.Namespace) -> list[Batch]:
    """Each row of documents in each layout."""
    found, zigzag = [], SequenceLayout("zigzag", args.devices)
    for name, lengths in documents_of(args.tokens, args.number).items():
        segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
        dealt = SequenceLayout.for_documents(segments, args.devices, chunks_per_shard=args.chunks)
        found += [Batch(name, "zigzag", zigzag, segments), Batch(name, "dealt", dealt, segments)]
    return found


def programs_of(mesh, backward: bool) -> dict[str, object]:
    """Layout -> its one compiled program over (layout's table, segments, q, k, v, dout); "causal" has no segments."""

    def run(static, dealt, segments, q, k, v, dout):
        layout = static if dealt is None else dealt
        attend = functools.partial(ra.context_attention, mesh=mesh, layout=layout, segment_ids=segments)
        if not backward:
            return [attend(q, k, v)]
        out, vjp = jax.vjp(attend, q, k, v)
        return [out, *vjp(dout)]

    zigzag = SequenceLayout("zigzag", mesh.shape["sp"])
    program = jax.jit(functools.partial(run, zigzag))
    return {"causal": program, "zigzag": program, "dealt": jax.jit(functools.partial(run, None))}


def system_of(batch: Batch, program, arrays, mesh, *, segments: bool = True) -> System:
    """The batch as something to time; its tokens are dealt before the clock runs, as a loader does."""
    sharding, order = jax.NamedSharding(mesh, jax.P(None, "sp")), batch.order
    placed = [jax.device_put(order.permute(x, 1), sharding) for x in (batch.segments, *map(np.asarray, arrays))]
    ids = placed[0] if segments else None
    table = order if isinstance(order, DealtRows) else None
    name = batch.name if segments else "causal"
    return System(
        name,
        lambda: jax.block_until_ready(program(table, ids, *placed[1:])),
        lambda results: [order.unpermute(np.asarray(x), 1) for x in results],
    )


def measure(args: argparse.Namespace, batches: list[Batch], mesh, backward: bool) -> dict[str, list[float]]:
    """Name -> (wall, CPU) time over that of the visible area at the causal rate."""
    arrays, programs = (
        random_qkv(0, 1, args.tokens, args.heads, args.kv_heads, args.head_dim),
        programs_of(mesh, backward),
    )
    systems = [system_of(batches[0], programs["causal"], arrays, mesh, segments=False)]
    systems += [system_of(batch, programs[batch.layout], arrays, mesh) for batch in batches]
    for pair in (systems[:3], *(systems[i : i + 2] for i in range(3, len(systems), 2))):
        timing.require_agreement(pair)
    seconds = timing.both_clocks_in_turn(systems, args.repeats)
    area = {batch.name: float(batch.work.sum()) for batch in batches}
    rate = np.array(seconds["causal"]) / area[batches[0].name]
    return {name: (np.array(seconds[name]) / rate / area[name]).tolist() for name in area}


def facts_of(args: argparse.Namespace, batch: Batch) -> dict[str, object]:
    """What is counted rather than timed: balance, hops, bytes that a device sends forward and in both passes."""
    work, pairs = ra.STRATEGIES["ring"], batch.work
    hops = hops_needed(pairs)
    load = Workload(
        seq_len=args.tokens,
        devices=args.devices,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        itemsize=4,
        layout="zigzag",
        segments=True,
        hops=hops,
    )
    forward = work.sent_bytes(load)
    sent = [forward, forward + work.sent_bytes(load, backward=True)]
    return {"balance": balance_of(pairs).total, "hops": hops, "sent": sent}


def table_of(args: argparse.Namespace, batches: list[Batch], results: dict[str, dict], facts: dict[str, dict]) -> Table:
    """A row for each batch."""
    table = Table(
        title=f"Time / time of the visible area at the causal rate: S={args.tokens} H={args.heads} K={args.kv_heads} "
        f"D={args.head_dim}, {args.devices} simulated devices",
        caption=f"medians of {args.repeats} rounds on {os.cpu_count()} cores; busiest: pairs of a device over the "
        "mean; hops: forth+back; MB: what a device sends",
    )
    for name in ("documents", "layout"):
        table.add_column(name, no_wrap=True)
    for direction in results:
        for name in COLUMNS:
            table.add_column(f"{direction} {name}", justify="right")
    for name in ("busiest", "hops", *(f"{direction} MB" for direction in results)):
        table.add_column(name, justify="right")
    for batch in batches:
        times = [f"{x:.2f}" for direction in results for x in results[direction][batch.name]]
        fact = facts[batch.name]
        sent = [f"{size / 1e6:.1f}" for size, _ in zip(fact["sent"], results, strict=False)]
        hops = "+".join(map(str, fact["hops"]))
        end = batch.layout == "dealt"
        first = "" if end else batch.documents
        table.add_row(first, batch.layout, *times, f"{fact['balance']:.3f}", hops, *sent, end_section=end)
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, metavar="S", help="of a row")
    parser.add_heads(heads=8, kv_heads=2, head_dim=64)
    parser.add_argument("--devices", type=int, default=8, metavar="P", help="simulated devices of the ring")
    parser.add_argument("--number", type=int, default=16, help="documents of equal and of random lengths")
    parser.add_argument("--chunks", type=int, help="chunks of a shard in rows that are dealt; chosen where left out")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--forward", action="store_true", help="leave out forward+backward")
    parser.add_argument("--out", type=local_path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Check, time, print, write."""
    args = parse(argv)
    simulate_devices(args.devices)
    mesh = ra.make_mesh(sp=args.devices, devices=jax.devices()[: args.devices])
    batches = batches_of(args)
    directions = {"forward": False} | ({} if args.forward else {"both": True})
    results = {name: measure(args, batches, mesh, backward) for name, backward in directions.items()}
    facts = {batch.name: facts_of(args, batch) for batch in batches}
    show(table_of(args, batches, results, facts), Console(highlight=False))
    if args.out:
        settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        write_json(args.out, {"settings": settings, "times": results, "facts": facts})
