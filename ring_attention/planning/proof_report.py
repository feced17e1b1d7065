"""What the compiler said, as a person reads it."""

import dataclasses

from rich.table import Table

from ring_attention.planning.proof import Proof


def collectives_table(proof: Proof) -> Table:
    """Every collective by kind and mesh axis."""
    table = Table(title="Collectives of the compiled step, of one device")
    for name in ("kind", "axes"):
        table.add_column(name)
    for name in ("in the text", "runs", "GB received", "GB sent"):
        table.add_column(name, justify="right")
    for row in proof.collectives:
        runs = "unknown" if row.runs is None else f"{row.runs:,}"
        gigabytes = (f"{size / 1e9:.3f}" for size in (row.bytes, row.sent))
        table.add_row(row.kind, row.axes, str(row.instructions), runs, *gigabytes)
    return table


def transfers_table(proof: Proof) -> Table:
    """Every permute: the link's time beside that of what is computed meanwhile, at the chip's peak."""
    table = Table(
        title="Transfers of the ring: the link's time, and what is computed meanwhile at the chip's peak",
        caption="of one run; a device waits for what is exposed; in a chip's practice computing takes longer and "
        "hides more",
    )
    for name in ("pass", "axes"):
        table.add_column(name)
    for name in ("runs", "MB", "link ms", "computing ms", "exposed ms", ""):
        table.add_column(name, justify="right")
    for row in proof.transfers:
        hidden = row.asynchronous and row.exposed_seconds <= 0
        verdict = "hidden" if hidden else "synchronous" if not row.asynchronous else "exposed"
        times = (f"{x * 1e3:.3f}" for x in (row.link_seconds, row.compute_seconds, row.exposed_seconds))
        runs = "?" if row.runs is None else f"{row.runs:,}"
        style = "" if hidden else "red"
        table.add_row(row.phase, row.axes, runs, f"{row.bytes / 1e6:.1f}", *times, verdict, style=style)
    return table


def verdict(proof: Proof) -> str:
    """One line: how many transfers are covered by computing, and what the others cost a step."""
    hidden = sum(row.asynchronous and row.exposed_seconds <= 0 for row in proof.transfers)
    waits = sum(row.exposed_seconds * (row.runs or 1) for row in proof.transfers)
    total = len(proof.transfers)
    return f"{hidden} of {total} transfers are covered by computing; the others cost {waits * 1e3:.1f} ms of a step"


def as_json(proof: Proof) -> dict:
    """All of it, for a file."""
    return dataclasses.asdict(proof) | {"memory_total": proof.memory.total, "verdict": verdict(proof)}
