"""Does a config fit a pod, what will it wait for, and which strategy should it take? Before anything is rented.

  python scripts/plan.py --config=configs/tpu_v5e_256_7b.py --topology=v5e:16x16
  python scripts/plan.py --config=configs/gpu_8xh100_7b.py --topology=h100:1x8 --out=plans/h100
  python scripts/plan.py --config=configs/tpu_v5e_256_7b.py --topology=v5e:16x16 --compile
  python scripts/plan.py --config=configs/tpu_v5e_256_7b.py --topology=v5e:16x16 --max_context
  python scripts/plan.py --topology=h100:1x8 --config=configs/gpu_8xh100_7b.py --measured=doctor.json
  python scripts/plan.py --table2

Any field can be overridden as for train.py, for example --config.seq_len=4194304. The first form takes two seconds and
compiles nothing. --compile has the real training step compiled for the pod (pip install -e '.[compile-tpu]' or
'.[compile-gpu]') and prints what the compiler says beside what was predicted. --max_context has the longest context
found that compiles within the chip's memory. --out writes plan.json and the pictures memory.png, timeline.png and
map.png. --measured takes the rates that scripts/doctor.py measured on such a chip in place of published ones.
docs/planner.md explains every column.
"""

import argparse
import shlex
from pathlib import Path

import jax
from rich.console import Console

from ring_attention.checks import ConfigError, local_path, printable
from ring_attention.commands.arguments import Parser
from ring_attention.commands.program import invocation
from ring_attention.hardware.chips import CHIPS, GPU_MEMORY_FRACTION, GiB
from ring_attention.hardware.topology import find_topology
from ring_attention.json_files import write_json
from ring_attention.planning import compile_report, report
from ring_attention.planning.compile_report import CompileReport, longest_compiled, make_report
from ring_attention.planning.measured import with_measured
from ring_attention.planning.plan import Plan, make_plan
from ring_attention.tables import show
from ring_attention.training.flags import parse_config, split_path

DEFAULT_CONFIG = "tpu_v5e_256_7b"


def main(argv: list[str]) -> int:
    """Plan, print, and write; returns the exit status: 1 if the config does not fit."""
    args, flags = parse(argv)
    console = Console(highlight=False)
    if args.table2:
        if flags:
            raise ConfigError(f"{printable(flags[0])}: --table2 plans nothing; leave it out, or see plan.py --help")
        show(report.paper_table(), console)
        return 0
    topology = find_topology(args.topology)
    if args.measured:
        topology = with_measured(topology, args.measured)
    plan = make_plan(parse_config(flags, DEFAULT_CONFIG), topology)
    compiled = compile_plan(plan, console) if args.compile else None
    describe(plan, compiled, flags, console)
    if args.max_context:
        find_longest(plan, console)
    if args.out:
        write(plan, compiled, args.out, console)
    enough = compiled.memory.total <= topology.chip.memory if compiled else plan.own.fits
    return 0 if enough else 1


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those that are the config's."""
    parser = Parser(description=__doc__)
    parser.add_argument("--topology", default="v5e:16x16", help=f"such as v5e:16x16 or h100:4x8; {', '.join(CHIPS)}")
    parser.add_argument("--compile", action="store_true", help="ask the pod's own compiler as well")
    parser.add_argument("--max_context", action="store_true", help="find the longest context that compiles in memory")
    parser.add_argument("--table2", action="store_true", help="the Ring Attention paper's Table 2, and end")
    parser.add_argument("--measured", type=local_path, metavar="FILE", help="of the doctor: plan with its rates")
    parser.add_argument("--out", type=local_path, metavar="FOLDER", help="write plan.json and pictures there")
    return parser.parse_known_args(argv)


def compile_plan(plan: Plan, console: Console) -> CompileReport:
    """Ask the pod's compiler."""
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    with console.status(f"compiling the training step for {plan.share.topology.name}"):
        return make_report(plan)


def find_longest(plan: Plan, console: Console) -> None:
    """Compile ever closer to the chip's memory."""
    jax.config.update("jax_platforms", "cpu")

    def show(tokens: int, needed: float, fits: bool) -> None:
        console.print(f"  {tokens:,} tokens: {needed / GiB:.2f} GiB, {'fits' if fits else 'does not fit'}")

    console.print("Longest context, compiled:")
    with console.status("compiling"):
        longest = longest_compiled(plan, show)
    console.print(f"Longest context that compiles within the memory: [bold]{longest:,}[/bold] tokens")


def describe(plan: Plan, compiled: CompileReport | None, flags: list[str], console: Console) -> None:
    """Print the tables and the advice; `flags` are the config's own."""
    share = plan.share
    mesh = " ".join(f"{name}={size}" for name, size in share.mesh.items() if size > 1)
    console.print(
        f"{share.config.name}: {share.model.num_parameters:,} parameters, {share.config.seq_len:,} tokens of context, "
        f"{share.tokens:,} on each device; mesh {mesh or 'of one device'}"
    )
    blocks = share.attention.blocks
    kernel = f"attention kernel: {share.attention.kernel.name}, tiles of {blocks.q} x {blocks.kv} tokens"
    console.print(f"{kernel}; {share.kernel_reason}" if share.kernel_reason else kernel, markup=False)
    console.print(f"model FLOPs of a step: {plan.model_flops:.3g}")
    show(report.hardware_table(plan), console)
    show(report.memory_table(plan, compiled and compiled.memory.total), console)
    for table in (report.wire_table, report.hiding_table, report.strategy_table):
        show(table(plan), console)
    if compiled:
        describe_compiled(compiled, console)
    if plan.recommended is None:
        console.print(f"[red]Nothing fits[/red]: {plan.reason}.")
    else:
        console.print(f"Take [bold green]{plan.recommended.label}[/bold green]: {plan.reason}.")
        console.print(command(plan, flags), soft_wrap=True, markup=False)  # whole, so that it can be pasted
    if not plan.own.fits:
        chip = share.topology.chip
        console.print(
            f"[red]This config does not fit[/red]: {plan.memory.total / GiB:.1f} GiB of {chip.memory / GiB:.1f} GiB. "
            + (
                f"A context of {plan.longest:,} tokens would."
                if plan.longest
                else "No context would; use more devices."
            )
        )
    else:
        console.print(f"Longest context that fits, predicted: {plan.longest:,} tokens")


def command(plan: Plan, flags: list[str]) -> str:
    """Return the line for a shell that trains what was planned by the strategy that is advised.

    Args:
      plan: which advises one.
      flags: those of this command line that are the config's, which the plan holds for; the advice overrides them.
    """
    path, overrides = split_path(flags, DEFAULT_CONFIG)
    words = [*invocation("train").split(), f"--config={path}", *overrides, *plan.recommended.flags]
    setting = "" if plan.share.topology.tpu else f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MEMORY_FRACTION:g} "
    return setting + shlex.join(words)


def describe_compiled(compiled: CompileReport, console: Console) -> None:
    """Print what the compiler said."""
    names = ", ".join(f"{name} {version}" for name, version in compiled.versions.items())
    console.print(f"Compiled in {compiled.seconds:.0f} s by {names}")
    show(compile_report.collectives_table(compiled), console)
    show(compile_report.transfers_table(compiled), console)
    console.print(compile_report.verdict(compiled))
    for warning in compiled.warnings:
        console.print(f"[red]warning[/red]: {warning}")


def write(plan: Plan, compiled: CompileReport | None, folder: Path, console: Console) -> None:
    """Write the JSON and the pictures."""
    from ring_attention.planning import plots  # slow to import

    folder.mkdir(parents=True, exist_ok=True)
    written = report.as_json(plan) | ({"compiled": compile_report.as_json(compiled)} if compiled else {})
    write_json(folder / "plan.json", written)
    plots.draw_all(plan, folder, compiled and compiled.memory.total)
    console.print(f"Written: {folder}/plan.json, memory.png, timeline.png, map.png")
