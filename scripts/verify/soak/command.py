"""Trains again and again while it breaks what can break, and checks that nothing is lost.

  python -m scripts.verify soak --minutes=30 --out=soak

A small run is trained once undisturbed. Then it is trained while its processes are killed and terminated, its
checkpoints damaged, its disk filled; after every restart each loss must be, bit for bit, that of the undisturbed run.
docs/reliability.md says what is promised. Exits with 1 if any of it was not kept. Needs Linux.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.json_files import write_json
from ring_attention.tables import show
from scripts.verify.soak.faults import FAULTS
from scripts.verify.soak.run import REPOSITORY, Trainer
from scripts.verify.soak.session import Session, line_of

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
SEVERAL, STEPS_OF_SEVERAL = 4, 80  # processes of a shared run, and its steps: on few cores they mostly wait
TINY = "seq_len=64 attention.block_q=8 attention.block_kv=8 log_every=1 eval_every=20 checkpoint_every=3"
TINY += " data.holdout_fraction=0.3 data.streams=4"


def make_trainers(out: Path, num_steps: int) -> dict[int, Trainer]:
    """Return trainers of configs/tiny.py, smaller still, on one process and on several; `out` is for what they leave.

    What one start compiles the next ones find in a cache, so that a start costs the imports.
    """
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for file in sorted(REPOSITORY.glob("ring_attention/*/*.py")):
        (corpus / f"{file.parent.name}_{file.stem}.txt").write_bytes(file.read_bytes() + b"\n")
    fields = [*TINY.split(), f"num_steps={num_steps}", f"data.paths={corpus}/*.txt"]
    train = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        f"--config={REPOSITORY}/configs/tiny.py",
        *(f"--config.{f}" for f in fields),
    ]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {"JAX_PLATFORMS": "cpu"} | os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    poison, fewer = [sys.executable, "-m", "scripts.verify.soak.poison"], min(num_steps, STEPS_OF_SEVERAL)
    one = Trainer(train, poison, env, out / "logs", num_steps, checkpoint_every=3)
    ring = ["--config.mesh.fsdp=1", f"--config.mesh.sp={SEVERAL}", "--config.mesh.tp=1", f"--config.num_steps={fewer}"]
    return {1: one, SEVERAL: dataclasses.replace(one, command=[*train, *ring], num_steps=fewer, processes=SEVERAL)}


def main(argv: list[str]) -> int:
    """Soak in the folder that is given, or in one that is removed afterwards."""
    parser = Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="of faults, beside the undisturbed runs")
    parser.add_argument("--seed", type=int, default=0, help="of the order, the moments and the places")
    parser.add_argument(
        "--out", type=local_path, help="a new folder for runs, logs and soak.json; by default none stays"
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left running
    with tempfile.TemporaryDirectory(prefix="soak") as temporary:
        return soak(args, Path(args.out or temporary).resolve())


def soak(args: argparse.Namespace, out: Path) -> int:
    """Inject, report; return 0 if nothing was wrong."""
    console = Console(highlight=False, soft_wrap=True)
    session = Session(make_trainers(out, args.steps), out, seed=args.seed, deadline=args.deadline, kinds=args.faults)
    console.print(f"Training {args.steps} steps undisturbed first, which compiles; logs in {out / 'logs'}")
    session.run(60 * args.minutes, tell=lambda outcome: console.print(line_of(outcome)))
    show(session.table())
    for end in session.ends:
        console.print(line_of(end))
    figures = session.as_json()
    console.print(*(f"{name}: {value}" for name, value in figures.items() if name != "outcomes"), sep="\n")
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    record = figures | {"date": f"{datetime.date.today()}", "seed": args.seed, "versions": versions}
    write_json(out / "soak.json", record)
    return int(figures["problems"] > 0)
