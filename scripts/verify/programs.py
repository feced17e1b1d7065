"""What the compiler makes of ring attention: transfers, bytes, largest array, memory. Nothing is run.

  python -m scripts.verify programs --rings 2 4 8 32 --out structure.json
  python -m scripts.verify programs --rings 8 --layout contiguous zigzag striped --window 0 512 2048 3072
  python -m scripts.verify programs --rings 4 8 --compare
  python -m scripts.verify programs --rings 4 8 --compare --topology v5e:2x4 --dtype bfloat16

The first three compile for simulated CPU devices, the last one for a pod that is not there (pip install -e
'.[compile-tpu]' or '.[compile-gpu]'). docs/structure.md shows the tables and says what each column proves.
"""

import argparse
import dataclasses
import functools
import itertools
import platform
import re
import time
from collections.abc import Iterator

import jax
import jaxlib
from rich.table import Table

import ring_attention as ra
from ring_attention.checks import require_field
from ring_attention.commands.arguments import Parser
from ring_attention.hardware.pods import pod_devices
from ring_attention.json_files import write_json
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.parallel.mesh import compiler_options
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.parallel.wires import hops_of
from ring_attention.planning.hlo import compiled, transfers
from ring_attention.tables import show
from scripts.verify.ring_traffic import PROGRAMS, Case, Traffic, bounds, written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled program; sizes are those of one device. None stands for what the compiler does not state."""

    case: Case
    written: Traffic
    permutes_bound: int
    bytes_bound: int
    permutes: int | None
    bytes_sent: int | None
    all_gathers: int
    other_collectives: int
    overlap: transfers.Overlap
    largest_array: int  # elements
    scores_of_shard: int  # t * T elements, what a dense row of scores, or a mask, would take
    temporary_bytes: int
    compile_seconds: float
    longest_hop: int  # links

    def flat(self) -> dict:
        """For a JSON file."""
        fields = dataclasses.asdict(self)
        written = {f"{name}_written": value for name, value in fields.pop("written").items()}
        return fields.pop("case") | written | fields.pop("overlap") | fields


def trace(case: Case, mesh: jax.sharding.Mesh, q, kv, impl: str) -> jax.stages.Traced:
    """Trace the program of a case for the shapes q [1,T,H,D] and kv [1,T,K,D]."""
    settings = dict(layout=case.layout, window=case.window, duplex=case.duplex, unroll=case.unroll, impl=impl)
    forward = functools.partial(ra.ring_attention, mesh=mesh, **settings)

    def forward_and_backward(q, k, v, dout):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, *vjp(dout)

    jit = functools.partial(jax.jit, compiler_options=compiler_options(mesh))
    if case.program == "forward":
        return jit(forward).trace(q, kv, kv)
    if case.program == "backward":  # what the forward pass keeps for it is an argument, as in a loop over layers
        vjp = jax.eval_shape(lambda *qkv: jax.vjp(forward, *qkv)[1], q, kv, kv)
        return jit(lambda vjp, dout: vjp(dout)).trace(vjp, q)
    return jit(forward_and_backward).trace(q, kv, kv, q)


def inspect(case: Case, devices: list[jax.Device], args: argparse.Namespace) -> Row:
    """Compile one program, from shapes alone, and read it."""
    P, t = case.ring_size, case.shard
    mesh = ra.make_mesh(sp=P, devices=devices[:P])
    sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))
    q, kv = (
        jax.ShapeDtypeStruct((1, P * t, heads, args.head_dim), args.dtype, sharding=sharding)
        for heads in (args.heads, args.kv_heads)
    )
    traced = trace(case, mesh, q, kv, args.impl)
    lowered, start = traced.lower(), time.monotonic()
    executable = lowered.compile()
    seconds = time.monotonic() - start
    text = executable.as_text()
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in compiled.KINDS}
    permutes = sent = None
    if devices[0].platform == "cpu":
        totals = compiled.totals(text)
        permutes, sent = totals.pop("collective-permute", (0, 0))
        counts = dict.fromkeys(compiled.KINDS, 0) | {kind: runs for kind, (runs, _) in totals.items()}
    token = args.kv_heads * args.head_dim
    permutes_bound, bytes_bound = bounds(case, token * kv.dtype.itemsize, token * 4)
    return Row(
        case=case,
        written=written(traced.jaxpr),
        permutes_bound=permutes_bound,
        bytes_bound=bytes_bound,
        permutes=permutes,
        bytes_sent=sent,
        all_gathers=counts["all-gather"],
        other_collectives=sum(counts.values()) - counts["all-gather"] - counts["collective-permute"],
        overlap=transfers.overlap_of(text),
        largest_array=max(array.size for array in compiled.arrays(text)),
        scores_of_shard=t * P * t,
        temporary_bytes=executable.memory_analysis().temp_size_in_bytes,
        compile_seconds=round(seconds, 2),
        longest_hop=hops_of(mesh).links,
    )


def of_transfers(row: Row) -> Iterator[tuple[str, str]]:
    """Columns of the table of transfers and sizes."""
    yield "permutes", f"{row.permutes}"
    yield "need", f"{row.permutes_bound}"
    yield "MiB sent", f"{row.bytes_sent / 2**20:.1f}"
    yield "written", f"{row.written.bytes / 2**20:.1f}"
    yield "need", f"{row.bytes_bound / 2**20:.1f}"
    yield "back", f"{row.written.bytes_back / 2**20:.1f}"
    yield "others", f"{row.all_gathers + row.other_collectives}"
    yield "largest", f"{row.largest_array / 1e6:.1f}"
    yield "t*T", f"{row.scores_of_shard / 1e6:.1f}"
    yield "temp", f"{row.temporary_bytes / 2**20:.0f}"


def of_schedules(row: Row) -> Iterator[tuple[str, str]]:
    """Columns of the table that compares schedules."""
    yield "runs", f"{row.written.permutes}"
    yield "sync", f"{row.overlap.synchronous}"
    yield "async", f"{row.overlap.asynchronous}"
    yield "hidden", f"{row.overlap.hidden}"
    yield "exposed", f"{row.overlap.exposed}"
    yield "in flight", f"{row.overlap.bytes_in_flight / 2**20:.1f}"
    yield "temp", f"{row.temporary_bytes / 2**20:.1f}"
    yield "compile", f"{row.compile_seconds:.1f} s"


CAPTIONS = {
    of_transfers: "need: the fewest; written: by our code, part of it back; largest, t*T: 1e6 elements; temp: MiB",
    of_schedules: "runs: permutes run; sync, async, hidden, exposed: permutes in the text; in flight and temp: MiB",
}

NAMES = {"ring_size": "P", "shard": "t", "unroll": "ring"}


def in_words(name: str, value) -> str:
    """A field of a case for a reader."""
    if name == "unroll":
        return "unrolled" if value else "loop"
    if name == "program":
        return value.replace("forward", "fwd").replace("backward", "bwd")
    return "-" if value is None else str(value)


def table_of(rows: list[Row], columns, where: str, args: argparse.Namespace) -> Table:
    """Return the rows as a table; what is the same in all of them stands in the title."""
    differing = {
        field.name: len({getattr(row.case, field.name) for row in rows}) > 1 for field in dataclasses.fields(Case)
    }
    same = {name: getattr(rows[0].case, name) for name, differs in differing.items() if not differs}
    named = [f"{NAMES.get(name, name)}={in_words(name, value)}" for name, value in same.items() if value]
    sizes = [f"H={args.heads}", f"K={args.kv_heads}", f"D={args.head_dim}"]
    kernel = [] if args.impl == "auto" else [args.impl]
    farthest = max(row.longest_hop for row in rows)
    links = [f"longest hop {farthest} link{'s' * (farthest > 1)}"] if farthest else []
    title = ", ".join([where, *kernel, args.dtype, *named, *sizes, *links])
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {platform.machine()}"
    table = Table(title=title, caption=f"{CAPTIONS[columns]}; {versions}")
    shown = [name for name, differs in differing.items() if differs]
    for name in shown:
        justify = "right" if name in ("ring_size", "window", "shard") else "left"
        table.add_column(NAMES.get(name, name), justify=justify, no_wrap=True)
    for name, _ in columns(rows[0]):
        table.add_column(name, justify="right", no_wrap=True)
    last = shown[-1] if shown else None
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        case, then = row.case, following and following.case
        words = [in_words(name, getattr(case, name)) for name in shown]
        alike = then and all(getattr(case, name) == getattr(then, name) for name in shown if name != last)
        table.add_row(*words, *(value for _, value in columns(row)), end_section=not alike)
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rings", type=int, nargs="+", default=[2, 4, 8, 32], metavar="P", help="ring sizes")
    parser.add_argument("--layout", choices=LAYOUT_KINDS, nargs="+", default=["zigzag"])
    parser.add_argument(
        "--window", type=int, nargs="+", default=[0], metavar="W", help="tokens that a token sees; 0: all before it"
    )
    parser.add_argument("--duplex", action="store_true", help="send half of each shard the other way round")
    parser.add_argument("--unroll", action="store_true", help="write the steps of the ring out")
    parser.add_argument("--compare", action="store_true", help="loop and unrolled ring side by side")
    parser.add_argument("--program", choices=PROGRAMS, nargs="+", default=[PROGRAMS[0], PROGRAMS[2]])
    parser.add_argument("--topology", metavar="POD", help="compile for a pod such as v5e:4x4, v5p:2x2x2 or h100:1x8")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--impl", default="auto", help="kernel that computes a hop")
    parser.add_argument("--shard", type=int, nargs="+", default=[2048], metavar="t", help="tokens of one device")
    parser.add_heads(heads=8, kv_heads=2, head_dim=64)
    parser.add_out()
    return parser.parse_args(argv)


def find_devices(args: argparse.Namespace) -> list[jax.Device]:
    """Devices to compile for."""
    most = max(args.rings)
    if args.topology is None:
        simulate_devices(most)
        return jax.devices()
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    devices = pod_devices(args.topology)
    need = f"a ring of {most} needs as many devices, this has {len(devices)}"
    require_field(len(devices) >= most, "topology", args.topology, need, "take a larger pod or smaller --rings")
    return devices


def main(argv: list[str]) -> None:
    """Compile, print, write."""
    args = parse(argv)
    devices = find_devices(args)
    unrolls = (False, True) if args.compare else (args.unroll,)
    windows = [window or None for window in args.window]
    choices = itertools.product(args.rings, args.layout, windows, args.shard, [args.duplex], args.program, unrolls)
    fields = [field.name for field in dataclasses.fields(Case)]
    rows = [inspect(Case(**dict(zip(fields, choice, strict=True))), devices, args) for choice in choices]
    columns = of_schedules if args.compare or args.topology else of_transfers
    table = table_of(rows, columns, args.topology or "CPU", args)
    show(table, keys=len(table.columns) - sum(1 for _ in columns(rows[0])) or None)
    if any(row.permutes is not None and row.permutes < row.permutes_bound for row in rows):
        print(
            "Fewer permutes than needed: hops outside of loops serve both passes, which keeps their blocks in memory."
        )
    if args.out:
        common = dict(topology=args.topology, dtype=args.dtype, heads=args.heads, kv_heads=args.kv_heads)
        common |= dict(head_dim=args.head_dim)
        write_json(args.out, [common | row.flat() for row in rows])
