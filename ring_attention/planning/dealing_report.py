"""The prediction for packed documents as a table, in words and as JSON, beside what others measured on theirs."""

import dataclasses
from typing import NamedTuple

from rich.table import Table

from ring_attention.planning.dealing import Dealing, attention_seconds


class Published(NamedTuple):
    """What others report of packed causal documents: TFLOP/s of a GPU, or how many times as fast a step got."""

    name: str
    forward: str = ""
    backward: str = ""
    step: str = ""


PUBLISHED = (
    Published("MagiAttention", "459", "360"),
    Published("its all-gather", "288", "179"),
    Published("its Ulysses", "278", "332"),
    Published("TransformerEngine's ring", "89", "97"),
    Published("Megatron-Core, dynamic context parallelism", step="up to 1.48"),
)
"""The first four are MagiAttention's charts: 8 H100, 64 query and 8 key/value heads of 128, 8,192 tokens a GPU, its own
documents. Megatron's is a whole training step, on its own documents, beside a fixed number of devices a document.
"""


def dealing_table(dealing: Dealing) -> Table:
    """Tabulate what each way to lay the documents out takes, and what others measured."""
    table = Table(title="Packed documents, predicted: each way to lay them out", caption=in_words(dealing))
    table.add_column("attention", no_wrap=True)
    for name in ("busiest / mean", "hops", "GB sent", "fwd TFLOP/s", "bwd TFLOP/s", "attention s", "x", "step s", "x"):
        table.add_column(name, justify="right")
    for way in dealing.ways:
        table.add_row(
            way.name,
            f"{way.balance:.2f}",
            "" if way.hops is None else f"{way.hops:.1f}",
            f"{way.sent / 1e9:.2f}",
            *(f"{rate / 1e12:.0f}" for rate in (way.forward, way.backward)),
            f"{attention_seconds(way):.3f}",
            f"{dealing.attention_speedup(way):.2f}",
            f"{way.time.total:.3f}",
            f"{dealing.speedup(way):.2f}",
            end_section=way is dealing.ways[-1],
        )
    for other in PUBLISHED:
        cells = ["", "", "", other.forward, other.backward, "", "", "", other.step]
        table.add_row(f"measured: {other.name}", *cells, style="dim")
    return table


def in_words(dealing: Dealing) -> str:
    """Say in two sentences what the table rests on."""
    lengths = dealing.lengths
    tokens = f"{lengths.tokens.mean():,.0f} tokens on average and {lengths.tokens.max():,} at most, {lengths.counted}"
    return (
        f"{dealing.rows} rows of documents drawn from {len(lengths.tokens):,} in {lengths.paths}, {tokens}; "
        f"{dealing.visible:.1%} of a causal row's pairs are visible. TFLOP/s of a device count those alone; tiles of "
        f"{dealing.tile} are computed whole, at the kernel's rate. Measured by others: 8 H100, 64:8 heads of 128, "
        "8,192 tokens a GPU, and documents of their own"
    )


def dealing_json(dealing: Dealing) -> dict:
    """Convert the prediction to what JSON can hold."""
    return {
        "documents": {
            "paths": dealing.lengths.paths,
            "number": len(dealing.lengths.tokens),
            "mean_tokens": float(dealing.lengths.tokens.mean()),
            "most_tokens": int(dealing.lengths.tokens.max()),
            "counted": dealing.lengths.counted,
        },
        "rows": dealing.rows,
        "visible": dealing.visible,
        "tile": dealing.tile,
        "ways": [
            dataclasses.asdict(way)
            | {"step_speedup": dealing.speedup(way), "attention_speedup": dealing.attention_speedup(way)}
            for way in dealing.ways
        ],
    }
