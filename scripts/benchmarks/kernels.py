"""How much of a kernel's speed is left when attention is cut into the hops of a ring.

  python -m scripts.benchmarks kernels --impl cudnn --out kernels.json

On one accelerator, all hops of one device of a zigzag ring of 8 against a single call of the same kernel over as many
pairs of queries and keys: for cudnn jax.nn.dot_product_attention(implementation="cudnn"). Runs alternate; the table
shows medians, TFLOP/s with 4 FLOPs forward and 10 backward for each pair and number of the head dim, and the ratio.
The hops also pay for picking their blocks out of one array, and give gradients of keys in float32.
Beside them the figures that FlashAttention-3 was published with for an H100 (Shah et al. 2024). docs/kernels.md
"""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
from rich.progress import Progress
from rich.table import Table

import ring_attention as ra
from ring_attention.attention.kernels import KERNELS, require_platform
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.checks import require
from ring_attention.commands.arguments import Parser, as_mistakes, write_json
from ring_attention.tables import show
from scripts.benchmarks import timing
from scripts.benchmarks.baselines import System
from scripts.benchmarks.single_rank import SingleRank

FLASH_ATTENTION_3 = {"forward": 648, "backward": 561}
"""TFLOP/s, head dim 128, 16K tokens, bidirectional, bf16/fp16, H100 SXM (Shah et al. 2024, figures 5 and 6)."""

PRODUCTS = {"forward": 2, "backward": 5}
LARGEST_ERROR = 0.02
"""Relative, between what the hops and what XLA's tiles give, above which they compute something else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes: `shard` tokens of one of `devices`, and which of them."""

    shard: int
    devices: int
    place: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that each device of a zigzag ring sees, for one head, its own diagonal too."""
        return self.shard * self.devices * self.shard // 2

    def array(self, seed: int, tokens: int, heads: int, *more: int):
        """Random numbers [..., 1, heads, tokens, D]."""
        shape = (*more, 1, heads, tokens, self.head_dim)
        return jax.random.normal(jax.random.key(seed), shape, self.dtype)


def hops_of(case: Case, impl: str) -> dict[str, System]:
    """Return the hops of one device: "forward" and "backward"."""
    P, mask = case.devices, MaskSpec(scale=case.head_dim**-0.5)
    device = SingleRank(kernel=KERNELS[impl], layout=ra.SequenceLayout("zigzag", P))
    q, dout = (case.array(seed, case.shard, case.heads) for seed in (0, 1))
    k, v = (case.array(seed, case.shard, case.kv_heads, P) for seed in (2, 3))
    place = jnp.int32(case.place)
    forward = jax.jit(functools.partial(device.forward, segments=None, mask=mask))
    backward = jax.jit(lambda *args: device.backward(*args[:4], None, mask, *args[4:]))
    out, lse = forward(place, q, k, v)
    other = SingleRank(kernel=KERNELS["xla"], layout=device.layout)
    want, _ = jax.jit(functools.partial(other.forward, segments=None, mask=mask))(place, q, k, v)
    _require_alike(impl, "out", out, want)
    wants = jax.jit(lambda *args: other.backward(*args[:4], None, mask, *args[4:]))(place, q, k, v, out, lse, dout)
    jax.tree.map(functools.partial(_require_alike, impl, "a gradient"), backward(place, q, k, v, out, lse, dout), wants)
    name = f"{P} hops"
    return {
        "forward": System(name, lambda: jax.block_until_ready(forward(place, q, k, v))),
        "backward": System(name, lambda: jax.block_until_ready(backward(place, q, k, v, out, lse, dout))),
    }


def _require_alike(impl: str, name: str, got, want) -> None:
    error = float(jnp.linalg.norm((got - want).astype("float32")) / jnp.linalg.norm(want.astype("float32")))
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"the hops of {impl} and of xla differ in {name} by {error:.1e}, relatively")


def one_call_of(case: Case, impl: str) -> dict[str, System]:
    """A single call over as many pairs: all queries of the device see half of all keys."""
    attend = functools.partial(ra.blockwise_attention, causal=False, impl=impl)
    if impl == "cudnn":
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    heads = {0: case.heads, 1: case.heads, 2: case.kv_heads, 3: case.kv_heads}
    keys = case.devices * case.shard // 2
    q, dout, k, v = (
        case.array(seed, case.shard if seed < 2 else keys, number).swapaxes(1, 2) for seed, number in heads.items()
    )
    forward, backward = jax.jit(attend), jax.jit(lambda vjp, dout: vjp(dout))
    vjp = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1])(q, k, v)
    return {
        "forward": System("one call", lambda: jax.block_until_ready(forward(q, k, v))),
        "backward": System("one call", lambda: jax.block_until_ready(backward(vjp, dout))),
    }


def measure(case: Case, impl: str, repeats: int, advance) -> dict[str, dict[str, float]]:
    """Pass -> {"hops": TFLOP/s, "one call": TFLOP/s, "ratio"}."""
    hops, one_call, found = hops_of(case, impl), one_call_of(case, impl), {}
    for name, products in PRODUCTS.items():
        systems = [hops[name], one_call[name]]
        for system in systems:  # compile
            system.run()
        seconds = timing.seconds_in_turn(systems, repeats, timing.CLOCKS["wall"], advance)
        flops = 2 * products * case.pairs * case.heads * case.head_dim
        speeds = {system.name: flops / seconds[system.name] / 1e12 for system in systems}
        mine, one_call = speeds.values()
        found[name] = {"hops": mine, "one call": one_call, "ratio": mine / one_call}
    return found


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
