"""Does a model fit a pod, what will it wait for, and how should it run there? Before anything is rented.

  python scripts/plan.py llama-3.1-8b --tokens=1M --topology=h100:1x8
  python scripts/plan.py FOLDER --tokens=128K --topology=h100:4x8 --network=400Gb
  python scripts/plan.py --config=configs/tpu_v5e_256_7b.py --topology=v5e:16x16
  python scripts/plan.py --config=configs/gpu_8xh100_7b.py --topology=h100:1x8 --out=plans/h100
  python scripts/plan.py --config=configs/tpu_v5e_256_7b.py --topology=v5e:16x16 --compile
  python scripts/plan.py --config=configs/tpu_v5e_256_7b.py --topology=v5e:16x16 --max_context
  python scripts/plan.py --topology=h100:1x8 --config=configs/gpu_8xh100_7b.py --measured=doctor.json
  python scripts/plan.py llama-3.1-8b --tokens=128K --topology=h100:1x8 --documents='data/*.jsonl'
  python scripts/plan.py --table2

The model is a well-known one (train.py --help lists them), a folder with the config.json of a Hugging Face checkpoint,
or that of a config file. Any field can be overridden as for train.py, for example --config.batch_size=16. Planning
takes about three seconds and compiles nothing. It ends with a search over strategies, meshes, rematerialisation, groups
of heads and micro-batches, and the commands for the fastest step that fits and for the longest context; --no_search
leaves that out. --compile has the real training step compiled for the pod (pip install -e '.[compile-tpu]' or
'.[compile-gpu]') and prints what the compiler says beside what was predicted. --max_context has the longest context
found that compiles within the chip's memory. --out writes plan.html, a page with all of it that needs no other file,
plan.json and the pictures memory.png, timeline.png and map.png. --measured takes the rates that scripts/doctor.py
measured on such a chip in place of published ones. --documents packs rows of documents as long as those of the files
(or of "python-stdlib") and predicts what dealing them by their work gains, beside what others report. The exit status
is 0 if the config fits as it is given, 1 if not.
docs/planner.md explains every column.
"""

import argparse
import dataclasses
import shlex
from pathlib import Path

import jax
from rich.console import Console

from ring_attention.checks import ConfigError, local_path, printable
from ring_attention.commands.arguments import Parser
from ring_attention.commands.plan_flags import config_flags, split_model, with_network
from ring_attention.commands.program import invocation
from ring_attention.hardware.chips import CHIPS, GPU_MEMORY_FRACTION, GiB
from ring_attention.hardware.topology import find_topology
from ring_attention.json_files import write_json
from ring_attention.planning import compile_report, report
from ring_attention.planning.advice import Advice, advise, in_words
from ring_attention.planning.compile_report import CompileReport, longest_compiled, make_report
from ring_attention.planning.dealing import Dealing, compare_layouts
from ring_attention.planning.dealing_report import dealing_json, dealing_table
from ring_attention.planning.documents import DocumentLengths
from ring_attention.planning.measured import with_measured
from ring_attention.planning.page import Advised, make_page
from ring_attention.planning.plan import Candidate, Plan, make_plan
from ring_attention.planning.strategy_map import map_strategies
from ring_attention.tables import show
from ring_attention.training.config import TrainConfig
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
    if args.network:
        topology = with_network(topology, args.network)
    if args.measured:
        topology = with_measured(topology, args.measured)
    plan = make_plan(parse_config(flags, DEFAULT_CONFIG), topology)
    advice = advise(plan.share.config, topology) if args.search else None
    compiled = compile_plan(plan, console) if args.compile else None
    dealing = compare_documents(plan, args.documents) if args.documents else None
    describe(plan, advice, compiled, flags, console)
    if dealing:
        show(dealing_table(dealing), console)
    if args.max_context:
        find_longest(plan, console)
    if args.out:
        write(plan, advice, compiled, dealing, flags, args.out, console)
    enough = compiled.memory.total <= topology.chip.memory if compiled else plan.own.fits
    return 0 if enough else 1


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those that are the config's."""
    parser = Parser(description=__doc__, usage="%(prog)s [MODEL] [flags] [--config.FIELD=VALUE ...]")
    parser.add_argument("--topology", default="v5e:16x16", help=f"such as v5e:16x16 or h100:4x8; {', '.join(CHIPS)}")
    parser.add_argument("--tokens", metavar="N", help="of a sequence: 131072, 128K (of 1024) or 1.5M (of 1024 * 1024)")
    parser.add_argument(
        "--network",
        metavar="RATE",
        help="between hosts, for one device, one way: 400Gb (bits a second) or 50GB (bytes)",
    )
    parser.add_argument(
        "--no_search", dest="search", action="store_false", help="plan the config as it is, and no other"
    )
    parser.add_argument("--compile", action="store_true", help="ask the pod's own compiler as well")
    parser.add_argument("--max_context", action="store_true", help="find the longest context that compiles in memory")
    parser.add_argument(
        "--documents", metavar="GLOBS", help="predict rows of documents as long as those of these files"
    )
    parser.add_argument("--table2", action="store_true", help="the Ring Attention paper's Table 2, and end")
    parser.add_argument("--measured", type=local_path, metavar="FILE", help="of the doctor: plan with its rates")
    parser.add_argument("--out", type=local_path, metavar="FOLDER", help="write a page, plan.json and pictures there")
    model, argv = split_model(argv, {"--no_search", "--compile", "--max_context", "--table2"})
    args, flags = parser.parse_known_args(argv)
    return args, config_flags(model, args.tokens, flags)


def compile_plan(plan: Plan, console: Console) -> CompileReport:
    """Ask the pod's compiler."""
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    with console.status(f"compiling the training step for {plan.share.topology.name}"):
        return make_report(plan)


def compare_documents(plan: Plan, paths: str) -> Dealing:
    """Predict rows packed from documents as long as those of the files; the section data says how they are read."""
    config = plan.share.config
    data = dataclasses.replace(config.data, paths=paths)
    return compare_layouts(plan, DocumentLengths.read(data, config.model.vocab_size))


def find_longest(plan: Plan, console: Console) -> None:
    """Compile ever closer to the chip's memory."""
    jax.config.update("jax_platforms", "cpu")

    def show(tokens: int, needed: float, fits: bool) -> None:
        console.print(f"  {tokens:,} tokens: {needed / GiB:.2f} GiB, {'fits' if fits else 'does not fit'}")

    console.print("Longest context, compiled:")
    with console.status("compiling"):
        longest = longest_compiled(plan, show)
    console.print(f"Longest context that compiles within the memory: [bold]{longest:,}[/bold] tokens")


def describe(
    plan: Plan, advice: Advice | None, compiled: CompileReport | None, flags: list[str], console: Console
) -> None:
    """Print the tables and the advice; `flags` are the config's own."""
    share = plan.share
    mesh = " ".join(f"{name}={size}" for name, size in share.mesh.items() if size > 1)
    console.print(
        f"{share.config.name}: {share.config.transformer.num_parameters:,} parameters, "
        f"{share.config.seq_len:,} tokens of context, {share.tokens:,} on each device; mesh {mesh or 'of one device'}"
    )
    for group in share.groups:
        kernel, blocks = share.attention_of(group.kind).kernel, share.attention_of(group.kind).blocks
        of_kind = f" of {group.layers} layers, {group.name}" * (len(share.groups) > 1)
        words = f"attention kernel{of_kind}: {kernel.name}, tiles of {blocks.q} x {blocks.kv} tokens"
        reason = share.kernel_reason_of(group.kind)
        console.print(f"{words}; {reason}" if reason else words, markup=False)
    console.print(f"model FLOPs of a step: {plan.model_flops:.3g}")
    show(report.hardware_table(plan), console)
    show(report.memory_table(plan, compiled and compiled.memory.total), console)
    by_kind = (report.kind_table,) * (len(share.groups) > 1)
    for table in (report.wire_table, *by_kind, report.hiding_table, report.strategy_table):
        show(table(plan), console)
    if compiled:
        describe_compiled(compiled, console)
    if plan.recommended is None:
        console.print(f"[red]On this mesh nothing fits[/red]: {plan.reason}.")
    else:
        console.print(f"On this mesh take [bold green]{plan.recommended.label}[/bold green]: {plan.reason}.")
    if not plan.own.fits:
        need = f"{plan.memory.total / GiB:.1f} GiB of {share.topology.chip.memory / GiB:.1f} GiB"
        remedy = f"a context of {plan.longest:,} tokens would" if plan.longest else "no context would"
        console.print(f"[red]This config does not fit[/red]: {need}; {remedy}.")
    else:
        console.print(f"Longest context that fits as it is, predicted: {plan.longest:,} tokens")
    if advice:
        for advised in spoken(plan, advice, flags):
            color = "green" if advised.good else "red"
            console.print(f"[bold {color}]{advised.title}[/bold {color}]: {advised.words}.")
            console.print(advised.command, soft_wrap=True, markup=False)  # whole, so that it can be pasted
    elif plan.recommended:
        console.print(command(plan.recommended, share.config, flags), soft_wrap=True, markup=False)


def spoken(plan: Plan, advice: Advice | None, flags: list[str]) -> list[Advised]:
    """Return what to run in words, with a command to paste for each."""
    config, found = plan.share.config, []

    def say(title: str, candidate: Candidate | None, good: bool = True) -> None:
        if candidate:
            found.append(Advised(title, in_words(candidate), command(candidate, config, flags), good))

    if advice is None:
        say("The fastest strategy on this mesh", plan.recommended)
        return found
    say("Fastest that fits", advice.fastest)
    if advice.one_change:
        say(f"One change makes this config fit, {' '.join(advice.one_change.flags(config))}", advice.one_change)
    if advice.larger:
        pod = advice.larger.share.topology
        title = f"Nothing fits here, but on {pod.name}, {pod.devices - plan.share.devices:,} devices more"
        say(title, advice.larger, good=False)
    if advice.longest:
        tokens = f"{advice.longest.share.config.seq_len:,} tokens"
        shorter = f"Nothing fits here, but a context of {tokens}" if advice.fastest is None else ""
        say(shorter or f"Longest context, {tokens}", advice.longest, good=not shorter)
    return found


def command(candidate: Candidate, config: TrainConfig, flags: list[str]) -> str:
    """Return the line for a shell that trains what was planned as a candidate runs it.

    Args:
      candidate: which.
      config: that was planned.
      flags: those of this command line that are the config's, which the plan holds for; the candidate's override them.
    """
    path, overrides = split_path(flags, DEFAULT_CONFIG)
    changes = candidate.flags(config)
    changed = {flag.partition("=")[0] for flag in changes}
    kept = [flag for flag in overrides if flag.partition("=")[0] not in changed or "=" not in flag]
    words = [*invocation("train").split(), f"--config={path}", *kept, *changes]
    setting = "" if candidate.share.topology.tpu else f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MEMORY_FRACTION:g} "
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


def write(
    plan: Plan,
    advice: Advice | None,
    compiled: CompileReport | None,
    dealing: Dealing | None,
    flags: list[str],
    folder: Path,
    console: Console,
) -> None:
    """Write the JSON and the pictures."""
    from ring_attention.planning import plots  # slow to import

    folder.mkdir(parents=True, exist_ok=True)
    written = report.as_json(plan, advice) | ({"compiled": compile_report.as_json(compiled)} if compiled else {})
    written |= {"packed": dealing_json(dealing)} if dealing else {}
    write_json(folder / "plan.json", written)
    found = map_strategies(plan.share)
    plots.draw_all(plan, found, folder, compiled and compiled.memory.total)
    (folder / "plan.html").write_text(make_page(plan, advice, spoken(plan, advice, flags), found), encoding="utf-8")
    console.print(f"Written: {folder}/plan.html, plan.json, memory.png, timeline.png, map.png")
