"""The loss of training with its gradients, by what happens to the logits: three ways, side by side.

  python -m scripts.benchmarks loss
  python -m scripts.benchmarks loss --vocab_size=264 --repeats=15

"used while they exist" is what training does: the logits of a chunk of tokens give its gradients at once. "made again"
differentiates the losses of `chunked_cross_entropy`: the backward pass makes each chunk's logits a second time. "all
kept" makes those of all tokens at once and keeps them. Tokens are sharded over --sp simulated devices. Runs alternate;
medians of milliseconds, and what the compiled program takes on a device beside its arguments. The results of all three
must agree. docs/benchmarks.md
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from rich.table import Table

import ring_attention as ra
from ring_attention.commands.arguments import Parser
from ring_attention.doctor.timing import System, seconds_in_turn
from ring_attention.models.loss import chunked_cross_entropy, weighted_cross_entropy
from ring_attention.parallel.mesh import SEQUENCE, TENSOR
from ring_attention.tables import show
from scripts.benchmarks import timing


def used_while_they_exist(hidden, unembed, targets, weights, chunk):
    """Return the weighted sum of losses as training computes it."""
    return weighted_cross_entropy(hidden, unembed, targets, weights, chunk_size=chunk)


def made_again(hidden, unembed, targets, weights, chunk):
    """Return the weighted sum of losses, its gradients by autodiff of a chunk after the other."""
    return (chunked_cross_entropy(hidden, unembed, targets, chunk_size=chunk) * weights).sum()


def all_kept(hidden, unembed, targets, weights, chunk):
    """Return the weighted sum of losses with the logits of all tokens, which autodiff keeps."""
    del chunk
    logits = hidden @ unembed
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return lax.psum(((jax.nn.logsumexp(logits, axis=-1) - target) * weights).sum(), TENSOR)  # of one device


WAYS = {"used while they exist": used_while_they_exist, "made again": made_again, "all kept": all_kept}


def main(argv: list[str]) -> None:
    """Time every way."""
    args = parse(argv)
    jax.config.update("jax_num_cpu_devices", args.sp)
    mesh = ra.make_mesh(sp=args.sp)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, args.seq_len, args.model_dim))
    unembed = jax.random.normal(keys[1], (args.model_dim, args.vocab_size)) * args.model_dim**-0.5
    targets = jax.random.randint(keys[2], hidden.shape[:2], 0, args.vocab_size)
    arrays = (hidden, unembed, targets, jnp.ones(targets.shape))
    sizes = f"T={args.seq_len} over {args.sp} devices, M={args.model_dim} V={args.vocab_size}, chunks of {args.chunk}"
    table = Table(title=f"The loss and its gradients, float32\n{sizes}")
    for column in ("logits are", "ms", "x", "temporary MiB"):
        table.add_column(column, justify="left" if column == "logits are" else "right")
    programs = {name: compiled(way, mesh, arrays, args.chunk) for name, way in WAYS.items()}
    systems = [
        System(name, functools.partial(lambda program: jax.block_until_ready(program(*arrays)), program))
        for name, program in programs.items()
    ]
    timing.require_agreement(systems)
    seconds = seconds_in_turn(systems, args.repeats, timing.CLOCKS["wall"])
    first = seconds[systems[0].name]
    for name, program in programs.items():
        temporary = program.memory_analysis().temp_size_in_bytes / 2**20
        table.add_row(name, f"{1000 * seconds[name]:.1f}", f"{seconds[name] / first:.2f}", f"{temporary:.1f}")
    show(table)


def compiled(way, mesh, arrays, chunk: int) -> jax.stages.Compiled:
    """Return the sum over devices, its gradient by the hidden states and that by the unembedding."""

    def on_device(hidden, unembed, targets, weights):
        def total(hidden, unembed):
            return lax.psum(way(hidden, unembed, targets, weights, chunk), SEQUENCE)

        value, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden, unembed)
        return value, *gradients

    tokens, vocabulary = PartitionSpec(None, SEQUENCE), PartitionSpec(None, TENSOR)
    in_specs, out_specs = (tokens, vocabulary, tokens, tokens), (PartitionSpec(), tokens, vocabulary)
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)).lower(*arrays).compile()


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    defaults = dict(seq_len=8192, sp=2, model_dim=256, vocab_size=32_000, chunk=1024, repeats=7)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    wrong = [name for name, value in vars(args).items() if value < 1]
    if wrong:
        parser.error(f"--{wrong[0]} must be positive; give at least 1")
    if args.seq_len % args.sp:
        parser.error(f"--sp={args.sp} must divide --seq_len={args.seq_len}; choose others")
    return args
