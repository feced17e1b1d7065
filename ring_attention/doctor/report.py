"""A checkup as a person reads it: a table of everything that was measured."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from ring_attention.doctor.advice import Advice
from ring_attention.hardware.chips import Chip, GiB

MAGI_ATTENTION = {"forward": 645, "backward": 529}
"""TFLOP/s that it publishes for one call at the shape `checkup.PUBLISHED` on an H100."""


class Row(NamedTuple):
    """A line of the table: the part, what of it, the figure, and what to compare it with."""

    part: str
    what: str
    found: str
    beside: str = ""


def table_of(title: str, rows: Sequence[Row], advice: Sequence[Advice]) -> Table:
    """Tabulate rows; parts of which something is off are red."""
    table, wrong, before = Table(title=title), {line.part for line in advice if line.wrong}, ""
    for name in ("part", "what", "found", "beside"):
        table.add_column(name)
    for row in rows:
        if before not in ("", row.part):
            table.add_section()
        cells = [escape(cell) for cell in row[1:]]
        table.add_row("" if before == row.part else row.part, *cells, style="red" if row.part in wrong else "")
        before = row.part
    return table


def rows_of(found: Mapping, failed: Mapping[str, str], skipped: Mapping[str, str], chip: Chip | None) -> Iterator[Row]:
    """The rows of every part, in the order in which they were run, those too that failed or do not apply."""
    of_part = {"limits": _limits, "step": _step, "kernels": _kernels, "rates": _rates, "links": _links}
    for name, result in found.items():
        yield from (of_part | {"overlap": _overlap})[name](result, chip)
    for words, parts in (("failed", failed), ("left out", skipped)):
        yield from (Row(part, words, reason) for part, reason in parts.items())


def _limits(limits: Mapping, chip: Chip | None) -> Iterator[Row]:
    yield from (Row("limits", name, version) for name, version in limits["versions"].items())
    kinds = collections.Counter((x["kind"], x["memory"], x["compute_capability"]) for x in limits["devices"])
    for (kind, memory, capability), number in kinds.items():
        yield Row("limits", "devices", f"{number} x {kind}", f"compute capability {capability}" if capability else "")
        yield Row("limits", "memory of each", _bytes(memory, "the host's"), _planned(chip))
    yield Row("limits", "free on the host", _bytes(limits["host_memory"], "not known"))
    for name in ("driver", "cudnn", "memory_fraction"):
        yield Row("limits", name.replace("_", " "), limits[name] or "none")


def _planned(chip: Chip | None) -> str:
    return f"{_bytes(chip.memory)} planned with" if chip else ""


def _step(step: Mapping, chip: Chip | None) -> Iterator[Row]:
    sizes = f"{step['parameters']:,} parameters, {step['tokens']:,} tokens a device"
    speed = f"{_seconds(step['seconds'])}, {step['tokens_per_second']:,.0f} tokens/s"
    speed += f", MFU {step['mfu']:.0%}" if step["mfu"] else ""
    where = f"predicted for {step['predicted_for']}"
    yield Row("step", sizes, speed, f"{_seconds(step['predicted_seconds'])} {where}" if chip else "")
    memory = f"{_bytes(step['compiled_bytes'])} compiled, peak {_bytes(step['peak_bytes'], 'not told here')}"
    yield Row("step", "memory of a device", memory, f"{_bytes(step['predicted_bytes'])} {where}")


def _kernels(kernels: Mapping, chip: Chip | None) -> Iterator[Row]:
    for name, result in kernels.items():
        if "ratios" in result:
            ratios = ", ".join(f"{part} {ratio:.2f}" for part, ratio in result["ratios"].items())
            yield Row("kernels", f"{name}, {result['dtype']}", ratios, "times dense attention's error")
        else:
            words, reason = next(iter(result.items()))
            yield Row("kernels", name, f"{words}: {reason}")


def _rates(rates: Mapping, chip: Chip | None) -> Iterator[Row]:
    for row in rates["rows"]:
        heads = f"{row['heads']}:{row['kv_heads']} heads of {row['head_dim']}"
        shape = f"{heads}, {row['shard']:,} tokens, ring of {row['devices']}"
        if "failed" in row:
            yield Row("rates", f"{row['kernel']}, {shape}", f"failed: {row['failed']}")
        for name, rate in row.get("passes", {}).items():
            beside = f"one call {_flops(rate['one call'] * 1e12)}: {rate['ratio']:.2f} of it"
            beside += f"; MagiAttention on an H100: {MAGI_ATTENTION[name]}" if row["shape"] == "published" else ""
            yield Row("rates", f"{row['kernel']} {name}, {shape}", f"hops {_flops(rate['hops'] * 1e12)}", beside)
    yield Row("rates", "dense layers", _flops(rates["matmul"]), f"{_flops(chip.flops)} published" if chip else "")


def _links(links: Mapping, chip: Chip | None) -> Iterator[Row]:
    for way, found in links.items():
        beside = f"{chip.link / 1e9:.0f} GB/s published" if chip else ""
        words = f"{found['bandwidth'] / 1e9:.3g} GB/s, {_seconds(found['latency'])} of latency"
        yield Row("links", f"a hop {way} the ring", words, beside)


def _overlap(overlap: Mapping, chip: Chip | None) -> Iterator[Row]:
    times = {name: _seconds(overlap[name]) for name in ("ring", "without transfers", "transfers alone")}
    beside = f"ring {times['ring']}, without transfers {times['without transfers']}, these {times['transfers alone']}"
    yield Row("overlap", f"transfers hidden, {overlap['kernel']}", f"{overlap['hidden']:.0%}", beside)


def _bytes(size: float | None, unknown: str = "") -> str:
    if size is None:
        return unknown
    return f"{size / GiB:.2f} GiB" if size >= GiB / 10 else f"{size / 2**20:.2f} MiB"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
