"""Speed of ring attention on simulated CPU devices, beside that of others on the same machine in the same run.

  pip install -e '.[benchmark]'  # the paper's own code, to compare with
  python scripts/benchmark_attention.py --backward --out benchmarks/cpu

Systems take turns, so that a slow minute of the machine hits all of them; the table shows medians of useful GFLOP/s, in
which causal attention counts half of all scores and a backward pass 2.5 forward passes. All systems are checked to
agree before any is timed. docs/benchmarks.md shows a run.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ring_attention as ra
from ring_attention.evaluation.exactness import NAMES, random_qkv, relative_error
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.parallel.simulate import simulate_devices

PAPER, PAPER_CHUNKS = "the paper's code", (256, 512)
DENSE, TORCH, MATMUL = "jax.nn.dot_product_attention, 1 device", "PyTorch CPU flash SDPA", "matmul 2048 x 2048"
MATMUL_SIZE = 2048
LARGEST_DISAGREEMENT = 1e-4
"""Relative difference between two systems' float32 results above which one of them computes something else."""


CLOCKS = {"wall": time.perf_counter, "cpu": lambda: time.process_time() / os.cpu_count()}
"""Seconds on the wall, or those that all threads together computed, shared out over the cores."""


class System(NamedTuple):
    """Something to time: `run()` returns its results, finished; `natural` puts them as JAX would, in natural order."""

    name: str
    run: Callable[[], object]
    natural: Callable[[object], list] = lambda results: results


def with_gradients(attend: Callable, backward: bool) -> Callable:
    """`attend` over (q, k, v, dout) as one compiled program: [out], with `backward` [out, dq, dk, dv]."""

    def run(q, k, v, dout):
        if not backward:
            return [attend(q, k, v)]
        out, vjp = jax.vjp(attend, q, k, v)
        return [out, *vjp(dout)]

    return jax.jit(run)


def jax_system(name: str, attend: Callable, arrays, backward: bool, natural: Callable = lambda x: x) -> System:
    """A System of a JAX function of q, k, v."""
    run = with_gradients(attend, backward)
    return System(name, lambda: jax.block_until_ready(run(*arrays)), lambda results: [natural(x) for x in results])


def ours(layout_kind: str, arrays, mesh, backward: bool) -> System:
    """Ring attention in one layout; tokens are dealt before the clock runs, as a loader does."""
    layout = ra.SequenceLayout(layout_kind, mesh.shape["sp"])
    sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))
    dealt = [jax.device_put(layout.permute(x, axis=1), sharding) for x in arrays]
    attend = functools.partial(ra.ring_attention, mesh=mesh, layout=layout)
    return jax_system(f"ours, {layout_kind}", attend, dealt, backward, lambda x: layout.unpermute(np.asarray(x), 1))


def load_paper() -> object | None:
    """The module `ringattention_jax` of the paper's package; None where that is not installed.

    It is loaded by its path, because the package itself does not import on this JAX.
    """
    try:
        path = importlib.metadata.distribution("ringattention").locate_file("ringattention/ringattention_jax.py")
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("ringattention_jax", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paper(module, chunk: int, arrays, mesh, backward: bool) -> System:
    """The paper's ring attention with chunks of this many tokens."""
    settings = dict(query_chunk_size=chunk, key_chunk_size=chunk, causal_block_size=1, deterministic=True)
    settings |= dict(dropout_rng=None, attn_pdrop=0.0, dtype=jnp.float32, precision=None, prevent_cse=False)
    settings |= dict(policy=jax.checkpoint_policies.nothing_saveable)

    def on_shard(q, k, v, bias):
        return module.ring_attention(q, k, v, bias, None, None, "sp", True, settings)

    B, T = arrays[0].shape[:2]
    spec = jax.P(None, "sp")
    sharded = jax.shard_map(on_shard, mesh=mesh, in_specs=(spec, spec, spec, jax.P()), out_specs=spec, check_vma=False)
    bias = jnp.zeros((B, 1, 1, T), jnp.float32)
    dealt = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in arrays]
    return jax_system(f"{PAPER}, chunk {chunk}", lambda q, k, v: sharded(q, k, v, bias), dealt, backward, np.asarray)


def dense(arrays, backward: bool) -> System:
    """JAX's own attention on one device."""
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return jax_system(DENSE, attend, arrays, backward, np.asarray)


def pytorch(arrays, backward: bool) -> System | None:
    """PyTorch's flash attention on the CPU, on all cores as JAX; None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count())
    heads_first = [torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays]
    inputs, dout = [x.requires_grad_(backward) for x in heads_first[:3]], heads_first[3]

    def run():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return [out, *torch.autograd.grad(out, inputs, dout)] if backward else [out]

    return System(TORCH, run, lambda results: [x.detach().transpose(1, 2).numpy() for x in results])


def systems_of(args: argparse.Namespace, arrays, backward: bool) -> list[System]:
    """Everything that can run here, JAX's dense attention first unless its gradients are not asked for."""
    mesh = ra.make_mesh(sp=args.devices, devices=jax.devices()[: args.devices])
    systems = [dense(arrays, backward)] if args.dense_backward or not backward else []
    systems += [ours(kind, arrays, mesh, backward) for kind in LAYOUT_KINDS]
    module = load_paper()
    if module is not None and args.kv_heads == args.heads:
        chunks = [chunk for chunk in PAPER_CHUNKS if args.tokens // args.devices % chunk == 0]
        systems += [paper(module, chunk, arrays, mesh, backward) for chunk in chunks]
    torch_system = pytorch(arrays, backward)
    return systems if torch_system is None else [*systems, torch_system]


def require_agreement(systems: list[System]) -> None:
    """Raise RuntimeError unless all systems give what the first gives. Compiles and warms them up."""
    want = systems[0].natural(systems[0].run())
    for system in systems[1:]:
        got = system.natural(system.run())
        for name, g, w in zip(NAMES, got, want, strict=False):  # forward alone has no gradients
            error = relative_error(g, w)
            if not error <= LARGEST_DISAGREEMENT:
                raise RuntimeError(f"{system.name} and {systems[0].name} differ in {name} by {error:.1e}, relatively")


def seconds_in_turn(systems: list[System], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each system, one run of each in every round, in an order drawn anew for each round.

    In a fixed order each system would always run after the same other one, and pay for what that leaves behind: memory
    that was given back, threads that still spin. Ours in the contiguous layout lost a third of its speed that way
    (docs/experiments.md).
    """
    seconds = {system.name: [] for system in systems}
    order = random.Random(0)
    for _ in range(repeats):
        for system in order.sample(systems, len(systems)):
            start = clock()
            system.run()
            seconds[system.name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(args: argparse.Namespace, backward: bool) -> dict[str, float]:
    """Useful GFLOP/s of each system; of the paper's two chunk sizes the better one."""
    arrays = random_qkv(0, 1, args.tokens, args.heads, args.kv_heads, args.head_dim)
    systems = systems_of(args, arrays, backward)
    require_agreement(systems)
    matrix = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    matmul = System(MATMUL, lambda: jax.block_until_ready(multiply(matrix, matrix)))
    matmul.run()
    seconds = seconds_in_turn([*systems, matmul], args.repeats, CLOCKS[args.clock])
    forward_flops = 4 * args.tokens**2 * args.heads * args.head_dim / 2
    flops = dict.fromkeys(seconds, forward_flops * (3.5 if backward else 1)) | {MATMUL: 2 * MATMUL_SIZE**3}
    speeds = {name: flops[name] / seconds[name] / 1e9 for name in seconds}
    chunks = [speeds.pop(name) for name in list(speeds) if name.startswith(PAPER)]
    return speeds | ({PAPER: max(chunks)} if chunks else {})


def names_in_order(speeds: dict[str, float]) -> list[str]:
    """Ours, the paper's, the others, the matmul."""
    rank = {PAPER: 1, DENSE: 2, TORCH: 3, MATMUL: 4}
    return sorted(speeds, key=lambda name: rank.get(name, 0))


def remarks(args: argparse.Namespace, measured: dict[str, float]) -> dict[str, str]:
    """What to say of the systems that did not run."""
    installed = "ringattention" in versions()
    needs = f"needs K = H and chunks of {min(PAPER_CHUNKS)}" if installed else "pip install -e '.[benchmark]'"
    missing = {PAPER: needs, TORCH: "pip install torch"}
    return {name: remark for name, remark in missing.items() if name not in measured}


def table_of(args: argparse.Namespace, results: dict[str, dict[str, float]]) -> Table:
    """Speed, ratio to the paper's code and share of the matmul, for each direction."""
    table = Table(
        title=f"Useful GFLOP/s: S={args.tokens} H={args.heads} K={args.kv_heads} D={args.head_dim} causal float32, "
        f"{args.devices} simulated devices",
        caption=f"medians of {args.repeats} interleaved rounds on {os.cpu_count()} cores, {args.clock} time; "
        "x paper: times as fast as the paper's code",
    )
    table.add_column("system")
    for direction in results:
        for name in (direction, "x paper", "of matmul"):
            table.add_column(name, justify="right")
    first = next(iter(results.values()))
    for system in names_in_order(first):
        cells = []
        for speeds in results.values():
            if system not in speeds:
                cells += ["not run", "", ""]
                continue
            ratio = f"{speeds[system] / speeds[PAPER]:.2f}" if PAPER in speeds and system != MATMUL else ""
            cells += [f"{speeds[system]:.0f}", ratio, f"{speeds[system] / speeds[MATMUL]:.0%}"]
        table.add_row(system, *cells)
    for system, remark in remarks(args, first).items():
        table.add_row(system, escape(remark), style="dim")
    return table


def draw(args: argparse.Namespace, results: dict[str, dict[str, float]], path: Path) -> None:
    """Bar chart, one panel for each direction."""
    figure = Figure(figsize=(5.2 + 4 * (len(results) - 1), 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True)
    for panel, (direction, speeds) in zip(np.atleast_1d(panels), results.items(), strict=True):
        names = [name for name in names_in_order(results["forward"]) if name != MATMUL]
        colors = ["#1f6fb4" if name.startswith("ours") else "#b9bec6" for name in names]
        bars = panel.barh(names, [speeds.get(name, 0) for name in names], color=colors)
        panel.bar_label(
            bars, labels=[f"{speeds[name]:.0f}" if name in speeds else "not run" for name in names], padding=3
        )
        panel.set_title(f"{direction}, GFLOP/s", loc="left", fontsize=11)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()
    figure.suptitle(f"Causal attention over {args.tokens} tokens, float32, {os.cpu_count()} CPU cores", fontsize=12)
    figure.savefig(path)


def versions() -> dict[str, str]:
    """Versions of what was compared; those that are installed."""
    found = {}
    for name in ("jax", "jaxlib", "ringattention", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse_args() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, metavar="S", help="length of the sequence")
    parser.add_argument("--heads", type=int, default=8, metavar="H", help="query heads")
    parser.add_argument("--kv-heads", type=int, metavar="K", help="key/value heads; H by default")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D")
    parser.add_argument("--devices", type=int, default=8, metavar="P", help="simulated devices of the ring")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that others use as well")
    parser.add_argument("--backward", action="store_true", help="time forward+backward as well")
    parser.add_argument(
        "--dense-backward",
        action="store_true",
        help="also time the gradients of JAX's dense attention: slow, and several arrays of 4*H*S*S bytes",
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="write PATH.json and a bar chart PATH.png")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    return args


def main() -> None:
    """Check, time, print, write."""
    args = parse_args()
    simulate_devices(args.devices)
    results = {"forward": measure(args, backward=False)}
    if args.backward:
        results["fwd+bwd"] = measure(args, backward=True)
    Console(width=110).print(table_of(args, results))
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"settings": vars(args) | {"out": str(args.out)}, "versions": versions(), "gflops": results}
        args.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        draw(args, results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
