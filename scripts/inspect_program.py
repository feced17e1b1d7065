"""What the compiler makes of ring attention: transfers, bytes, largest array, memory. Nothing is run.

  python scripts/inspect_program.py --rings 2 4 8 32 --out structure.json

docs/structure.md shows the table and says what each column proves.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from rich.console import Console
from rich.table import Table

import ring_attention as ra
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.planning import compiled

PROGRAMS = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled program; sizes are those of one device."""

    program: str
    ring_size: int
    permutes: int
    permutes_bound: int
    bytes_sent: int  # as the compiler sends them
    bytes_written: int  # as our code asks for
    bytes_bound: int
    all_gathers: int
    other_collectives: int
    largest_array: int  # elements
    scores_of_shard: int  # t * T elements, what a dense row of scores, or a mask, would take
    temporary_bytes: int


def bounds(program: str, P: int, block_bytes: int, gradient_bytes: int) -> tuple[int, int]:
    """(transfers, bytes) that a device cannot do without.

    Forward: the other P-1 devices' blocks of K and of V. Backward: those again, and dK and dV of each block, in
    float32, all the way around: P.
    """
    permutes, size = 2 * (P - 1), 2 * (P - 1) * block_bytes
    if program == "forward":
        return permutes, size
    return 2 * permutes + 2 * P, 2 * size + 2 * P * gradient_bytes


def bytes_written(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Bytes that the `ppermute`s of a traced program send from one device, loops multiplied out."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "ppermute":
            total += sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.invars)
        is_jaxpr = lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))  # noqa: E731
        inner = [x for x in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(x)]
        total += eqn.params.get("length", 1) * sum(map(bytes_written, inner))
    return total


def inspect(program: str, P: int, args: argparse.Namespace) -> Row:
    """Compile one program for a ring of P devices, from shapes alone, and read it."""
    mesh = ra.make_mesh(sp=P, devices=jax.devices()[:P])
    sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))
    t, T = args.shard, args.shard * P
    q, kv = (
        jax.ShapeDtypeStruct((1, T, heads, args.head_dim), args.dtype, sharding=sharding)
        for heads in (args.heads, args.kv_heads)
    )

    def forward(q, k, v):
        return ra.ring_attention(q, k, v, mesh=mesh, layout=args.layout)

    def forward_and_backward(q, k, v, dout):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, *vjp(dout)

    if program == "forward":
        traced = jax.jit(forward).trace(q, kv, kv)
    else:
        traced = jax.jit(forward_and_backward).trace(q, kv, kv, q)
    executable = traced.lower().compile()
    text = executable.as_text()
    totals = compiled.totals(text)
    permutes, sent = totals.pop("collective-permute", (0, 0))
    all_gathers, _ = totals.pop("all-gather", (0, 0))
    block = t * args.kv_heads * args.head_dim
    permutes_bound, bytes_bound = bounds(program, P, block * kv.dtype.itemsize, block * 4)
    return Row(
        program=program,
        ring_size=P,
        permutes=permutes,
        permutes_bound=permutes_bound,
        bytes_sent=sent,
        bytes_written=bytes_written(traced.jaxpr),
        bytes_bound=bytes_bound,
        all_gathers=all_gathers,
        other_collectives=sum(runs for runs, _ in totals.values()),
        largest_array=max(array.size for array in compiled.arrays(text)),
        scores_of_shard=t * T,
        temporary_bytes=executable.memory_analysis().temp_size_in_bytes,
    )


def table_of(rows: list[Row], args: argparse.Namespace) -> Table:
    """The rows as a table."""
    table = Table(
        title=f"{args.layout}, {args.dtype}, {args.shard} tokens a device, H={args.heads} K={args.kv_heads} "
        f"D={args.head_dim}; sizes per device",
        caption="need: the fewest possible; written: what our code asks for; largest and t*T: millions of elements",
    )
    for name in ("P", "permutes", "need", "MiB sent", "written", "need", "gathers", "others", "largest", "t*T", "temp"):
        table.add_column(name, justify="right", no_wrap=True)
        if name == "P":
            table.add_column("program", no_wrap=True)
    for row in rows:
        mebibytes = [row.bytes_sent, row.bytes_written, row.bytes_bound]
        counts = [row.permutes, row.permutes_bound, *(f"{size / 2**20:.1f}" for size in mebibytes)]
        counts += [row.all_gathers, row.other_collectives]
        sizes = [f"{row.largest_array / 1e6:.1f}", f"{row.scores_of_shard / 1e6:.1f}"]
        table.add_row(
            str(row.ring_size),
            row.program.replace("forward", "fwd").replace("backward", "bwd"),
            *map(str, counts),
            *sizes,
            f"{row.temporary_bytes / 2**20:.0f} MiB",
            end_section=row.program == PROGRAMS[-1],
        )
    return table


def parse_args() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rings", type=int, nargs="+", default=[2, 4, 8, 32], metavar="P", help="ring sizes")
    parser.add_argument("--layout", choices=LAYOUT_KINDS, default="zigzag")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shard", type=int, default=2048, metavar="t", help="tokens of one device")
    parser.add_argument("--heads", type=int, default=8, metavar="H", help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, metavar="K", help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON to this file")
    return parser.parse_args()


def main() -> None:
    """Compile, print, write."""
    args = parse_args()
    simulate_devices(max(args.rings))
    rows = [inspect(program, P, args) for P in args.rings for program in PROGRAMS]
    Console(width=110).print(table_of(rows, args))
    if any(row.permutes < row.permutes_bound for row in rows):
        print(
            "Fewer permutes than needed: the compiler kept blocks of the forward for the backward; that costs memory."
        )
    if args.out:
        args.out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
