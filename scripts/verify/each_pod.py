"""A table over pods that are not there: the flags, the loop and the file of the commands that compile for each."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
from rich.console import Console
from rich.table import Table

from ring_attention.commands.arguments import Parser
from ring_attention.json_files import write_json
from ring_attention.tables import show


def compile_for_each(
    argv: list[str],
    description: str,
    pods: Sequence[str],
    shard: int,
    rows_of: Callable[[str, int], Iterable],
    table_of: Callable[[list, int], Table],
) -> list:
    """Compile for each pod of a command line, print the rows, and return them; a file has them after each pod.

    Args:
      argv: the words after the command's name.
      description: of the command.
      pods: topologies, where the command line names none.
      shard: tokens of a device, where it does not say.
      rows_of: the rows, dataclasses, of a pod and so many tokens of a device.
      table_of: the rows for a reader, given those tokens.
    """
    parser = Parser(description=description)
    parser.add_argument("pods", nargs="*", default=pods, help=f"topologies; {' '.join(pods)} by default")
    parser.add_argument("--shard", type=int, default=shard, metavar="t", help="tokens of one device")
    parser.add_out()
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    console, rows = Console(highlight=False), []
    for pod in args.pods:
        with console.status(f"compiling for {pod}"):
            rows += rows_of(pod, args.shard)
        if args.out:
            write_json(args.out, [dataclasses.asdict(row) for row in rows])
    show(table_of(rows, args.shard), console)
    return rows
