"""Attention of one new token to a cache, on one device: three ways, side by side.

  python -m scripts.benchmarks decode
  python -m scripts.benchmarks decode --slots=32768 --heads=8 --kv_heads=2 --head_dim=64

"pass over slots" is what a device does in decode_attention; "dense" is the whole row of scores in one product, as most
people write it; "blockwise" is ra.blockwise_attention with explicit positions. Runs alternate; medians of milliseconds,
and what the compiled program takes beside its arguments. The results of all three must agree. docs/generation.md
"""

import argparse

import jax
import jax.numpy as jnp
from rich.table import Table

import ring_attention as ra
from ring_attention.attention import online_softmax
from ring_attention.attention.cached import Cache, attend_cached
from ring_attention.attention.device_kind import kind_here
from ring_attention.attention.kernels.tile_sizes import slots_of
from ring_attention.attention.mask_spec import make_mask_spec
from ring_attention.commands.arguments import Parser
from ring_attention.doctor.timing import System, seconds_in_turn
from ring_attention.tables import show
from scripts.benchmarks import timing

FILLED = (1.0, 0.5, 0.1)
"""Shares of the cache that are in use."""


def pass_over_slots(q, k, v, positions, slots):
    """Out [B,1,H,D] by the pass that decode_attention makes."""
    mask = make_mask_spec(
        q, causal=True, window=None, softcap=None, scale=None, alibi_slopes=None, dropout_rate=0.0, dropout_key=None
    )
    cache, size = Cache(k, v), slots_of(kind_here(), q.shape[3], q.shape[2] // k.shape[2])
    state = attend_cached(q, cache, mask=mask, q_positions=positions, kv_positions=slots, size=size)
    return jnp.swapaxes(online_softmax.finalize(state)[0], 1, 2).astype(q.dtype)


def dense(q, k, v, positions, slots):
    """Attend by a dense product; grouped queries stay grouped, or it would take several times as long."""
    B, T, H, D = q.shape
    q = q.reshape(B, T, k.shape[2], -1, D)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q, k, preferred_element_type=jnp.float32) * D**-0.5
    seen = positions[:, None, None, :, None] >= slots
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("BKGTS,BSKD->BTKGD", weights, v).reshape(B, T, H, D)


def blockwise(q, k, v, positions, slots):
    """Attend by the kernel of training."""
    return ra.blockwise_attention(q, k, v, q_positions=positions, kv_positions=slots)


WAYS = {"pass over slots": pass_over_slots, "dense": dense, "blockwise": blockwise}


def main(argv: list[str]) -> None:
    """Time every way at every filling."""
    args = parse(argv)
    jax.config.update("jax_default_matmul_precision", "float32")  # a GPU would take TensorFloat-32, and ways differ
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(args.rows, 1, args.heads, args.head_dim), *[(args.rows, args.slots, args.kv_heads, args.head_dim)] * 2]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    slots, cache = jnp.arange(args.slots)[None], 2 * arrays[1].nbytes / 2**20
    sizes = f"B={args.rows} S={args.slots} H={args.heads} K={args.kv_heads} D={args.head_dim}"
    table = Table(title=f"{sizes}\ncache {cache:.0f} MiB of float32")
    for column in ("filled", "way", "ms", "temporary MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for filled in FILLED:
        positions = jnp.full((args.rows, 1), int(args.slots * filled) - 1)
        programs = {name: jax.jit(way).lower(*arrays, positions, slots).compile() for name, way in WAYS.items()}

        def system(name, program, positions=positions):
            return System(name, lambda: [jax.block_until_ready(program(*arrays, positions, slots))])

        systems = [system(name, program) for name, program in programs.items()]
        timing.require_agreement(systems)
        seconds = seconds_in_turn(systems, args.repeats, timing.CLOCKS["wall"])
        for name, program in programs.items():
            temporary = program.memory_analysis().temp_size_in_bytes / 2**20
            table.add_row(f"{filled:.0%}", name, f"{1000 * seconds[name]:.2f}", f"{temporary:.1f}")
        table.add_section()
    show(table, keys=2)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    for name, default in dict(rows=1, slots=8192, heads=32, kv_heads=8, head_dim=128, repeats=15).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    wrong = [name for name, value in vars(args).items() if value < 1]
    if wrong:
        parser.error(f"--{wrong[0]} must be positive; give at least 1")
    if args.heads % args.kv_heads:
        parser.error(f"--kv_heads={args.kv_heads} must divide --heads={args.heads}; choose others")
    return args
