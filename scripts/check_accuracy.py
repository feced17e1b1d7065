"""Errors of ring attention against a float64 oracle, beside those of dense attention in the same dtype.

  python scripts/check_accuracy.py --out accuracy.json

Exits with 1 if any of out, dq, dk, dv is more than twice as far from the oracle as the dense implementation is.
docs/accuracy.md shows the table.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import ring_attention as ra
from ring_attention.evaluation import exactness
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.parallel.simulate import simulate_devices

MOST_DEVICES = 8
"""Rings up to this size run on simulated devices, longer ones as a `vmap` with an axis name on one device."""

UNITS = {"float32": 1e-7, "bfloat16": 1e-3}
"""What the table counts errors in."""


class Case(NamedTuple):
    """What one row checks."""

    ring_size: int
    layout: str
    dtype: str
    mask: str  # "causal" or "packed": causal within each of several documents


def grid() -> list[Case]:
    """Every dtype x mask x layout on 8 devices."""
    dtypes, masks = ("float32", "bfloat16"), ("causal", "packed")
    return [Case(8, layout, dtype, mask) for dtype in dtypes for mask in masks for layout in LAYOUT_KINDS]


def rings(ring_sizes: list[int]) -> list[Case]:
    """One case on rings of several sizes, in the dtype whose errors would grow first."""
    return [Case(P, "zigzag", "bfloat16", "causal") for P in ring_sizes]


def ring(layout: ra.SequenceLayout, segment_ids, *arrays) -> list[jax.Array]:
    """(out, dq, dk, dv) of ring attention for q, k, v and dout in natural order."""
    dealt = [None if x is None else layout.permute(x, axis=1) for x in (*arrays, segment_ids)]
    results = (on_devices if layout.ring_size <= MOST_DEVICES else on_one_device)(layout, *dealt)
    return [layout.unpermute(x, axis=1) for x in results]


def on_devices(layout: ra.SequenceLayout, q, k, v, dout, segment_ids):
    """(out, dq, dk, dv) of a ring of simulated devices."""
    mesh = ra.make_mesh(sp=layout.ring_size, devices=jax.devices()[: layout.ring_size])
    attend = functools.partial(ra.ring_attention, mesh=mesh, layout=layout, segment_ids=segment_ids)
    return exactness.out_and_gradients(attend, q, k, v, dout)


def on_one_device(layout: ra.SequenceLayout, *arrays):
    """(out, dq, dk, dv) of a ring that is an axis of a `vmap`."""

    def on_shard(q, k, v, dout, segment_ids):
        attend = functools.partial(ra.ring_attention_shard, layout=layout, segment_ids=segment_ids)
        return exactness.out_and_gradients(attend, q, k, v, dout)

    shards = jax.tree.map(lambda x: x.reshape(x.shape[0], layout.ring_size, -1, *x.shape[2:]), arrays)
    results = jax.vmap(on_shard, in_axes=1, out_axes=1, axis_name="sp")(*shards)
    return [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in results]


@functools.lru_cache(maxsize=1)
def inputs_and_oracle(dtype: str, mask: str, tokens: int, seed: int):
    """(arrays, mask arguments, oracle's results, errors of dense attention), shared by the cases that follow."""
    arrays = exactness.random_qkv(seed, B=2, T=tokens, H=4, K=2, D=32, dtype=dtype)
    rule = {"segment_ids": exactness.random_segments(seed, B=2, T=tokens)} if mask == "packed" else {}
    want = exactness.oracle(*arrays, **rule)
    dense = exactness.out_and_gradients(functools.partial(exactness.dense_attention, **rule), *arrays)
    return arrays, rule, want, exactness.errors(dense, want)


def check(case: Case, tokens: int, seed: int) -> dict:
    """The errors of one case, ours and dense attention's, by name."""
    arrays, rule, want, dense = inputs_and_oracle(case.dtype, case.mask, tokens, seed)
    layout = ra.SequenceLayout(case.layout, case.ring_size)
    ours = exactness.errors(ring(layout, rule.get("segment_ids"), *arrays), want)
    ratios = np.divide(ours, dense).tolist()
    by_name = {name: dict(ours=ours[i], dense=dense[i], ratio=ratios[i]) for i, name in enumerate(exactness.NAMES)}
    return case._asdict() | {"errors": by_name, "worst_ratio": max(ratios)}


def table_of(results: list[dict], tokens: int, limit: float) -> Table:
    """The results as a table."""
    table = Table(
        title=f"Relative error against float64, T={tokens} B=2 H=4 K=2 D=32: ours / dense in the same dtype",
        caption=f"worst: the largest ratio of ours to dense in the row, at most {limit:g} allowed",
    )
    table.add_column("P", justify="right", no_wrap=True)
    for name in ("layout", "dtype, unit", "mask"):
        table.add_column(name, no_wrap=True)
    for name in exactness.NAMES:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    for i, result in enumerate(results):
        unit = UNITS[result["dtype"]]
        errors = [f"{e['ours'] / unit:.1f} / {e['dense'] / unit:.1f}" for e in result["errors"].values()]
        row = [str(result["ring_size"]), result["layout"], f"{result['dtype']}, {unit:g}", result["mask"]]
        last = i % len(LAYOUT_KINDS) == len(LAYOUT_KINDS) - 1
        style = None if result["worst_ratio"] <= limit else "bold red"
        table.add_row(*row, *errors, f"{result['worst_ratio']:.2f}", style=style, end_section=last)
    return table


def parse_args() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, metavar="T", help="length of the sequence")
    parser.add_argument(
        "--rings", type=int, nargs="*", default=[2, 8, 64], metavar="P", help="ring sizes compared in bfloat16"
    )
    parser.add_argument("--only-rings", action="store_true", help="leave out the layouts, dtypes and masks")
    parser.add_argument("--limit", type=float, default=2.0, help="largest ratio of our error to dense attention's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the results as JSON to this file")
    return parser.parse_args()


def main() -> int:
    """Check, print, write; 0 if every ratio is within the limit."""
    args = parse_args()
    simulate_devices(MOST_DEVICES)
    cases = rings(args.rings) if args.only_rings else grid() + rings(args.rings)
    results = [check(case, args.tokens, args.seed) for case in cases]
    Console(width=110).print(table_of(results, args.tokens, args.limit))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(any(not result["worst_ratio"] <= args.limit for result in results))


if __name__ == "__main__":
    sys.exit(main())
