"""How much of a kernel's speed is left when attention is cut into the hops of a ring.

  python -m scripts.benchmarks kernels --impl cudnn --out kernels.json

On one accelerator, all hops of one device of a zigzag ring of 8 against a single call of the same kernel over as many
pairs of queries and keys: for cudnn jax.nn.dot_product_attention(implementation="cudnn"). Runs alternate; the table
shows medians, TFLOP/s with 4 FLOPs forward and 10 backward for each pair and number of the head dim, and the ratio.
The hops also pay for picking their blocks out of one array, and give gradients of keys in float32.
Beside them the figures that FlashAttention-3 was published with for an H100 (Shah et al. 2024). docs/kernels.md
"""

import dataclasses
import statistics

import jax
from rich.progress import Progress
from rich.table import Table

from ring_attention.attention.kernels import KERNELS, require_platform
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.checks import require
from ring_attention.commands.arguments import Parser, as_mistakes
from ring_attention.doctor.rates import PRODUCTS, Case, measure
from ring_attention.json_files import write_json
from ring_attention.tables import show

FLASH_ATTENTION_3 = {"forward": 648, "backward": 561}
"""TFLOP/s, head dim 128, 16K tokens, bidirectional, bf16/fp16, H100 SXM (Shah et al. 2024, figures 5 and 6)."""


@as_mistakes(ValueError, RuntimeError)
def main(argv: list[str]) -> None:
    """Run, print, write."""
    parser = Parser(description=__doc__)
    parser.add_argument("--impl", choices=KERNELS, default="cudnn")
    parser.add_argument("--shard", type=int, nargs="+", default=[8192, 16384], metavar="t", help="tokens of a device")
    parser.add_argument("--devices", type=int, default=8, metavar="P", help="of the ring")
    parser.add_argument("--places", type=int, nargs="+", default=[0, 3, 7], help="which devices")
    parser.add_heads(heads=32, kv_heads=8, head_dim=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_out()
    args = parser.parse_args(argv)
    require_platform(KERNELS[args.impl], jax.default_backend())
    queries = jax.ShapeDtypeStruct((1, args.heads, args.shard[0], args.head_dim), args.dtype)
    KERNELS[args.impl].check(MaskSpec(scale=1.0), queries)
    require(
        all(0 <= place < args.devices for place in args.places),
        f"--places {args.places} must be numbers of the {args.devices} devices, 0 to {args.devices - 1}",
    )
    sizes = dict(devices=args.devices, heads=args.heads, kv_heads=args.kv_heads, head_dim=args.head_dim)
    cases = [Case(shard=t, place=i, dtype=args.dtype, **sizes) for t in args.shard for i in args.places]
    with Progress(transient=True) as bar:
        task = bar.add_task("runs", total=len(cases) * len(PRODUCTS) * 2 * args.repeats)
        results = [measure(case, args.impl, args.repeats, lambda: bar.advance(task)) for case in cases]
    device = jax.devices()[0].device_kind
    described = f"H={args.heads}, K={args.kv_heads}, D={args.head_dim}, {args.dtype}"
    table = Table(title=f"{args.impl} on {device}, jax {jax.__version__}, zigzag ring of {args.devices}, {described}")
    columns = ("tokens of a device", "device", "pass", "hops TFLOP/s", "one call TFLOP/s", "ratio", "FA3 published")
    for name in columns:
        table.add_column(name, justify="left" if name == "pass" else "right")
    for case, result in zip(cases, results, strict=True):
        for name, row in result.items():
            numbers = f"{row['hops']:.4g}", f"{row['one call']:.4g}", f"{row['ratio']:.3f}"
            table.add_row(f"{case.shard}", f"{case.place}", name, *numbers, f"{FLASH_ATTENTION_3[name]}")
    show(table, keys=3)
    for name in PRODUCTS:
        ratios = [result[name]["ratio"] for result in results]
        print(f"{name}: the hops reach {statistics.median(ratios):.3f} of one call's rate ({min(ratios):.3f} at least)")
    if args.out:
        rows = [dataclasses.asdict(case) | result for case, result in zip(cases, results, strict=True)]
        machine = dict(device=device, jax=jax.__version__, impl=args.impl)
        write_json(args.out, [machine | row for row in rows])
