"""Gradients of sharp attention in 16 bits: how exact they are, and what the four bits of out that they need cost.

  python -m scripts.benchmarks sharp
  python -m scripts.benchmarks sharp --dtype float16 --seq_len 4096

Errors of out, dq, dk and dv beside the float64 oracle, as multiples of what dense attention in the same dtype has, for
logits of standard deviation 1, 10 and 50, with the bits kept and without. Then the time of forward and backward pass
together, medians of runs that alternate, at --seq_len. docs/kernels.md
"""

import functools

import jax.numpy as jnp
import numpy as np
from rich.table import Table

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.commands.arguments import Parser
from ring_attention.tables import show
from ring_attention.testing import NAMES, dense_errors, errors, oracle, random_qkv
from scripts.benchmarks import timing
from scripts.benchmarks.baselines import jax_system, with_gradients

DEVIATIONS = (1, 10, 50)
KEPT, LOST = "bits kept", "rounded alone"


def main(argv: list[str]) -> None:
    """Print both tables."""
    parser = Parser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens of the timed runs")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args(argv)
    kernels.KERNELS["rounded"] = kernels.KERNELS["xla"]._replace(name="rounded", float32_out=False)
    ways = {
        name: functools.partial(ra.blockwise_attention, impl=impl) for name, impl in ((KEPT, "xla"), (LOST, "rounded"))
    }
    show(exactness(ways, args.dtype))
    arrays = random_qkv(0, 1, args.seq_len, 4, 2, 64, args.dtype)
    systems = [jax_system(name, attend, arrays, True) for name, attend in ways.items()]
    for system in systems:
        system.run()
    seconds = timing.seconds_in_turn(systems, args.repeats, timing.CLOCKS["cpu"])
    print(
        f"T={args.seq_len}, forward and backward: {1000 * seconds[KEPT]:.1f} ms with the bits, "
        f"{1000 * seconds[LOST]:.1f} without; {seconds[KEPT] / seconds[LOST]:.3f} times"
    )


def exactness(ways: dict, dtype: str) -> Table:
    """Return the errors of each way, as multiples of dense attention's, for logits of several deviations."""
    table = Table(title=f"errors / those of dense, {dtype}, 3 seeds")
    for column in ("logits", "way", *NAMES):
        table.add_column(column, justify="left" if column == "way" else "right")
    programs = {name: with_gradients(attend, True) for name, attend in ways.items()}
    for deviation in DEVIATIONS:
        ratios = {name: [] for name in ways}
        for seed in range(3):
            q, k, v, dout = random_qkv(seed, 1, 256, 4, 2, 64, dtype)
            k = (k.astype(jnp.float32) * deviation).astype(dtype)
            want, dense = oracle(q, k, v, dout), dense_errors(q, k, v, dout)
            for name, program in programs.items():
                ratios[name].append(np.divide(errors(program(q, k, v, dout), want), dense))
        for name, found in ratios.items():
            table.add_row(str(deviation), name, *(f"{x:.1f}" for x in np.mean(found, 0)))
    return table
