"""Trains again and again while it breaks what can break, and checks that nothing is lost.

  python -m scripts.verify soak --minutes=30 --out=soak

A small run is trained once undisturbed. Then it is trained while its processes are killed and terminated, its
checkpoints damaged, its disk filled; after every restart each loss must be, bit for bit, that of the undisturbed run.
docs/reliability.md says what is promised. Exits with 1 if any of it was not kept. Needs Linux.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.tables import show
from scripts.verify.soak.report import as_json, line_of, summary_of, table_of
from scripts.verify.soak.session import FAULTS, Session
from scripts.verify.soak.trainer import make_trainers

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="after which no fault is begun any more")
    parser.add_argument("--seed", type=int, default=0, help="of the order, the moments and the places")
    parser.add_argument(
        "--out", type=local_path, help="a new folder for runs, logs and soak.json; a temporary one by default"
    )
    parser.add_argument("--faults", default=",".join(FAULTS), metavar="KIND,KIND", help="one or more of %(default)s")
    parser.add_argument("--steps", type=int, default=600, help="of a run")
    parser.add_argument("--deadline", type=float, default=180, help="seconds without a sign of life that are a hang")
    args = parser.parse_args(argv)
    args.faults = args.faults.split(",")
    if unknown := set(args.faults) - set(FAULTS):
        parser.error(f"--faults: there is no {', '.join(sorted(unknown))}; choose from {', '.join(FAULTS)}")
    if args.out and args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out={args.out}: is not empty; give a new folder")
    return args


def soak(args: argparse.Namespace, out: Path) -> int:
    """Inject, report; 0 if nothing was wrong."""
    console = Console(highlight=False, soft_wrap=True)
    session = Session(
        make_trainers(out, args.steps),
        out,
        seed=args.seed,
        deadline=args.deadline,
        kinds=args.faults,
        tell=lambda outcome: console.print(line_of(outcome)),
    )
    console.print(f"Training {args.steps} steps undisturbed first, which compiles; logs in {out / 'logs'}")
    session.run(seconds=60 * args.minutes)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS} | {"python": platform.python_version()}
    show(table_of(session))
    console.print(summary_of(session))
    record = as_json(session) | {"date": f"{datetime.date.today()}", "seed": args.seed, "versions": versions}
    (out / "soak.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(record["problems"] > 0)


def main(argv: list[str]) -> int:
    """Soak in the folder that is given, or in one that is removed afterwards."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left running
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        return soak(args, args.out.resolve())
    with tempfile.TemporaryDirectory(prefix="soak") as out:
        return soak(args, Path(out))
