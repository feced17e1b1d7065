"""Errors of ring attention against a float64 oracle, beside those of dense attention in the same dtype.

  python -m scripts.verify accuracy --out accuracy.json

Exits with 1 if any of out, dq, dk, dv is more than twice as far from the oracle as the dense implementation is.
docs/accuracy.md shows the table.
"""

import argparse
import functools
import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import jax
import numpy as np
from rich.table import Table

import ring_attention as ra
from ring_attention import testing
from ring_attention.commands.arguments import Parser
from ring_attention.json_files import write_json
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.tables import show

MOST_DEVICES = 8
"""Rings up to this size run on simulated devices, longer ones as a `vmap` with an axis name on one device."""

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
SIZES = f"B={BATCH} H={HEADS} K={KV_HEADS} D={HEAD_DIM}"

UNITS = {"float32": 1e-7, "bfloat16": 1e-3, "float16": 1e-4}
"""What the table counts errors in, by dtype."""

MASKS = ("causal", "bidirectional", "packed", "window", "softcap", "sinks", "alibi", "dropout", "everything")
"""Causal but for "bidirectional"; "packed" is causal within each of several documents, "everything" is all of these."""

SHARP = {"logits x 10": 10, "logits x 50": 50}
"""Further rows in float32: by how much more than D**-0.5 products are scaled, and so the logits' standard deviation."""


class Case(NamedTuple):
    """A check that one row of the table shows."""

    ring_size: int
    layout: str
    dtype: str
    mask: str  # one of MASKS or of SHARP


def grid() -> list[Case]:
    """On 8 devices every dtype x mask in one layout, and the other layouts with the least and the most of masks.

    And in float32 every ring size and layout with sharp attention: there the order of sums shows.
    """
    cases = [Case(8, "zigzag", dtype, mask) for dtype in UNITS for mask in MASKS]
    ends = itertools.product(("contiguous", "striped"), ("float32", "bfloat16"), ("causal", "everything"))
    sharp = itertools.product((1, 2, 4, 8), LAYOUT_KINDS, ("float32",), SHARP)
    return cases + [Case(*choice) for choice in itertools.chain(((8, *end) for end in ends), sharp)]


def rings(ring_sizes: list[int]) -> list[Case]:
    """One case on rings of several sizes, in the dtype whose errors would grow first."""
    return [Case(P, "zigzag", "bfloat16", "causal") for P in ring_sizes]


def arguments_of(mask: str, tokens: int, seed: int) -> dict:
    """Arguments of `ring_attention`, of the oracle and of dense attention, in natural order."""
    if mask in SHARP:
        return dict(scale=SHARP[mask] * HEAD_DIM**-0.5)
    sinks = np.random.default_rng(seed).standard_normal(HEADS)
    arguments = dict(
        causal={},
        bidirectional=dict(causal=False),
        packed=dict(segment_ids=testing.random_segments(seed, B=BATCH, T=tokens)),
        window=dict(window=tokens // 8),
        softcap=dict(softcap=2.0),
        sinks=dict(sinks=sinks.astype(np.float32)),
        alibi=dict(alibi_slopes=(2.0 ** (-8 * np.arange(1, HEADS + 1) / HEADS)).astype(np.float32)),
        dropout=dict(dropout_rate=0.1, dropout_key=jax.random.key(seed)),
    )
    if mask != "everything":
        return arguments[mask]
    return {name: value for one in arguments.values() for name, value in one.items() if name != "causal"}


def ring(layout: ra.SequenceLayout, arguments: dict, *arrays) -> list[jax.Array]:
    """(out, dq, dk, dv) of ring attention for q, k, v and dout in natural order."""
    segment_ids = arguments.get("segment_ids")
    dealt = [None if x is None else layout.permute(x, axis=1) for x in (*arrays, segment_ids)]
    others = {name: value for name, value in arguments.items() if name != "segment_ids"}
    results = (on_devices if layout.ring_size <= MOST_DEVICES else on_one_device)(layout, others, *dealt)
    return [layout.unpermute(x, axis=1) for x in results]


def on_devices(layout: ra.SequenceLayout, others: dict, q, k, v, dout, segment_ids):
    """(out, dq, dk, dv) of a ring of simulated devices."""
    mesh = ra.make_mesh(sp=layout.ring_size, devices=jax.devices()[: layout.ring_size])
    attend = functools.partial(ra.ring_attention, mesh=mesh, layout=layout, segment_ids=segment_ids, **others)
    return testing.out_and_gradients(attend, q, k, v, dout)


def on_one_device(layout: ra.SequenceLayout, others: dict, *arrays):
    """(out, dq, dk, dv) of a ring that is an axis of a `vmap`."""

    def on_shard(q, k, v, dout, segment_ids):
        attend = functools.partial(ra.ring_attention_shard, layout=layout, segment_ids=segment_ids, **others)
        return testing.out_and_gradients(attend, q, k, v, dout)

    shards = jax.tree.map(lambda x: x.reshape(x.shape[0], layout.ring_size, -1, *x.shape[2:]), arrays)
    results = jax.vmap(on_shard, in_axes=1, out_axes=1, axis_name="sp")(*shards)
    return [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in results]


@functools.cache
def inputs_and_oracle(dtype: str, mask: str, tokens: int, seed: int):
    """(arrays, arguments, oracle's results, errors of dense attention), shared by cases."""
    arrays = testing.random_qkv(seed, B=BATCH, T=tokens, H=HEADS, K=KV_HEADS, D=HEAD_DIM, dtype=dtype)
    arguments = arguments_of(mask, tokens, seed)
    want = testing.oracle(*arrays, **arguments)
    dense = testing.out_and_gradients(functools.partial(testing.dense_attention, **arguments), *arrays)
    return arrays, arguments, want, testing.errors(dense, want)


def check(case: Case, tokens: int, seed: int) -> dict:
    """Return the errors of one case, ours and dense attention's, by name."""
    arrays, arguments, want, dense = inputs_and_oracle(case.dtype, case.mask, tokens, seed)
    layout = ra.SequenceLayout(case.layout, case.ring_size)
    ours = testing.errors(ring(layout, arguments, *arrays), want)
    ratios = np.divide(ours, dense).tolist()
    by_name = {name: dict(ours=ours[i], dense=dense[i], ratio=ratios[i]) for i, name in enumerate(testing.NAMES)}
    return case._asdict() | {"errors": by_name, "worst_ratio": max(ratios)}


def table_of(results: list[dict], tokens: int, limit: float) -> Table:
    """Return the results as a table."""
    table = Table(
        title=f"Relative error against float64, T={tokens} {SIZES}: ours / dense in the same dtype",
        caption=f"worst: the largest ratio of ours to dense in the row, at most {limit:g} allowed",
    )
    table.add_column("P", justify="right", no_wrap=True)
    for name in ("layout", "dtype, unit", "mask"):
        table.add_column(name, no_wrap=True)
    for name in testing.NAMES:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    for result, following in zip(results, [*results[1:], None], strict=True):
        unit = UNITS[result["dtype"]] * (10 if result["mask"] in SHARP else 1)
        errors = [f"{e['ours'] / unit:.1f} / {e['dense'] / unit:.1f}" for e in result["errors"].values()]
        row = [str(result["ring_size"]), result["layout"], f"{result['dtype']}, {unit:g}", result["mask"]]
        last = following is None or any(result[name] != following[name] for name in ("layout", "dtype"))
        style = None if result["worst_ratio"] <= limit else "bold red"
        table.add_row(*row, *errors, f"{result['worst_ratio']:.2f}", style=style, end_section=last)
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="length of the sequence")
    parser.add_argument(
        "--rings", type=int, nargs="*", default=[2, 8, 64], metavar="P", help="ring sizes compared in bfloat16"
    )
    parser.add_argument("--only_rings", action="store_true", help="leave out the layouts, dtypes and masks")
    parser.add_argument(
        "--masks", choices=(*MASKS, *SHARP), nargs="+", default=(*MASKS, *SHARP), help="of the layouts and dtypes"
    )
    parser.add_argument("--dtypes", choices=list(UNITS), nargs="+", default=list(UNITS), help="of the layouts")
    parser.add_argument("--limit", type=float, default=2.0, help="largest ratio of our error to dense attention's")
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the cases: compilation uses one core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_out()
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Check, print, write; 0 if every ratio is within the limit."""
    args = parse(argv)
    cases = [] if args.only_rings else grid()
    cases = [case for case in cases if case.mask in args.masks and case.dtype in args.dtypes] + rings(args.rings)
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), simulate_devices, (MOST_DEVICES,)) as workers:
        results = list(workers.map(functools.partial(check, tokens=args.tokens, seed=args.seed), cases))
    show(table_of(results, args.tokens, args.limit), keys=4)
    if args.out:
        write_json(args.out, results)
    return int(any(not result["worst_ratio"] <= args.limit for result in results))
