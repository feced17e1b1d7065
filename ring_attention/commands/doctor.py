"""Measure the devices at hand, and say what is off: kernels, links, overlap, and a training step's memory.

  python scripts/doctor.py
  python scripts/doctor.py --config=configs/gpu_8xh100_7b.py --tokens=32768 --layers=2
  python scripts/doctor.py --parts limits kernels

On all accelerators of this process, or on simulated devices of the CPU. The parts: limits (versions, driver, memory);
step (a training step of a small model, its memory beside the planner's prediction); kernels (each beside the float64
oracle, in units of dense attention's error); rates (TFLOP/s of one rank's hops and of one call over as many pairs, at
the shapes of --config and of 64:8 heads of 128, 8,192 tokens); links (bandwidth and latency of a hop along the ring and
against it); overlap (the share of a ring's transfers that its hops hide). Figures are medians of repeats that
alternate. Sizes are smaller on a CPU: --config=tiny, 256 tokens and 4 devices instead of a 7B config and 8,192 tokens.

What was found is a table and --out, which plan.py --measured takes; it is written after each part. One that fails is a
row and does not end the others. The exit status is 1 if something is off, with a line about what to do.
docs/doctor.md explains the figures.
"""

import argparse
import datetime
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape

from ring_attention.checks import ConfigError, local_path, require
from ring_attention.commands.arguments import Parser, as_mistakes
from ring_attention.doctor.advice import advise
from ring_attention.doctor.checkup import PARTS, Checkup, NothingToMeasureError, failure, measured_rates
from ring_attention.doctor.report import rows_of, table_of
from ring_attention.json_files import write_json
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.planning.measured import SCHEMA
from ring_attention.tables import show
from ring_attention.training.flags import parse_config

CONFIGS = {"cpu": "tiny", "gpu": "gpu_8xh100_7b", "tpu": "tpu_v5e_256_7b"}
"""Platform -> the config whose shapes are measured by default."""

SIMULATED, TOKENS, SIMULATED_TOKENS = 4, 8192, 256


def main(argv: list[str]) -> int:
    """Measure part after part, write, print; returns the exit status: 1 if something is off."""
    args, flags = parse(argv)
    parse_config(flags, CONFIGS["cpu"])  # a mistake costs its line before JAX looks for devices
    console = Console(highlight=False)
    checkup = open_checkup(args, flags)
    report = run(checkup, args.parts, args.out, console)
    rows = list(rows_of(report["found"], report["failed"], report["skipped"], checkup.chip))
    advice = judge(report)
    title = f"{report['devices']} x {report['device_kind']}, shapes of {report['config']}"
    show(table_of(title, rows, advice), console)
    for line in advice:
        console.print(f"{'[red]off[/red]' if line.wrong else 'note'}: {line.part}: {escape(line.words)}")
    status = int(any(line.wrong for line in advice))
    console.print("Something is off." if status else "Nothing is off.", f"Written: {args.out}")
    return status


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those that are the config's."""
    parser = Parser(description=__doc__)
    help_ = f"how many to take; by default all accelerators, or {SIMULATED} simulated devices"
    parser.add_argument("--devices", type=int, metavar="P", help=help_)
    help_ = f"of a device; by default {TOKENS}, or {SIMULATED_TOKENS} on a CPU"
    parser.add_argument("--tokens", type=int, metavar="t", help=help_)
    parser.add_argument("--layers", type=int, default=4, help="of the model that is trained, at most")
    parser.add_argument("--repeats", type=int, default=10, help="at most; what is slow is repeated 3 times")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to run", metavar="PART")
    parser.add_argument("--out", type=local_path, default=Path("doctor.json"), metavar="FILE", help="to write")
    args, flags = parser.parse_known_args(argv)
    for name in ("devices", "tokens", "layers", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}: must be positive; give 1 or more")
    return args, flags


@as_mistakes(ValueError, RuntimeError)
def open_checkup(args: argparse.Namespace, flags: list[str]) -> Checkup:
    """Find the devices, simulated ones where there are no others, and the config for them."""
    simulate_devices(args.devices or SIMULATED)
    found = jax.devices()
    simulated = found[0].platform == "cpu"
    number = args.devices or (SIMULATED if simulated else len(found))
    require(number <= len(found), f"--devices={number}: there are {len(found)}; give at most as many")
    config = parse_config(flags, CONFIGS.get(found[0].platform, CONFIGS["cpu"]))
    tokens = args.tokens or (SIMULATED_TOKENS if simulated else TOKENS)
    return Checkup(
        devices=found[:number], config=config, tokens=tokens, layers=args.layers, repeats=max(args.repeats, 3)
    )


def run(checkup: Checkup, parts: list[str], out: Path, console: Console) -> dict:
    """Run these parts one after the other, and write what was found so far after each."""
    report = {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": checkup.devices[0].platform,
        "device_kind": checkup.devices[0].device_kind,
        "devices": len(checkup.devices),
        "config": checkup.config.name,
        "found": {},
        "failed": {},
        "skipped": {},
    }
    write_json(out, report)  # where it cannot be written that is said now
    for name in [name for name in PARTS if name in parts]:
        start = time.monotonic()
        with console.status(f"measuring {name}"):
            try:
                report["found"][name] = PARTS[name](checkup, report["found"])
            except NothingToMeasureError as reason:
                report["skipped"][name] = str(reason)
            except Exception as error:  # whatever is wrong with one part, the others are worth having
                report["failed"][name] = failure(error)
        console.print(f"{name}: {time.monotonic() - start:.0f} s")
        lines = [line._asdict() for line in judge(report)]
        write_json(out, report | {"measured": measured_rates(report["found"]), "advice": lines})
    return report


def judge(report: dict) -> list:
    """The advice on what a report has found."""
    kind = {name: report[name] for name in ("platform", "device_kind")}
    return advise(report["found"], report["failed"], **kind)
