"""Does what the planner advises fit, as the pod's own compiler says? Compiles the commands that it prints.

  pip install -e '.[compile-tpu,compile-gpu]'
  python -m scripts.verify advice --out advice.json

Each case is a model on a pod, and one to five minutes on two cores, in a process of its own, since a compiler may end
it. Commands that --out has are not compiled again; they are shown as advised "before" where another is advised by now.
Cases whose compiler is not installed are left out. The exit status is 1 if a command needs more memory than there is,
or is not compiled.
"""

import dataclasses
import json
import multiprocessing
import shlex
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from ring_attention.checks import ConfigError, local_path
from ring_attention.commands.arguments import Parser
from ring_attention.commands.plan import command
from ring_attention.commands.plan_flags import config_flags
from ring_attention.hardware.chips import GiB
from ring_attention.hardware.pods import pod_devices
from ring_attention.hardware.topology import find_topology
from ring_attention.json_files import write_json
from ring_attention.planning.advice import advise
from ring_attention.planning.compile_report import DoesNotFitError, compile_for, versions
from ring_attention.planning.hlo.compiled import memory_of
from ring_attention.planning.memory import memory_of as predict
from ring_attention.planning.shares import Share
from ring_attention.tables import show
from ring_attention.training.config import TrainConfig
from ring_attention.training.flags import parse_config

FASTEST, LONGEST = "fastest", "longest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A command of plan.py, and which of the commands that it prints is compiled.

    Attributes:
      pod: its --topology.
      model: the preset.
      tokens: its --tokens.
      batch: sequences of a step.
      advised: the fastest step or the longest context.
    """

    pod: str
    model: str
    tokens: str
    batch: int = 1
    advised: str = FASTEST

    @property
    def flags(self) -> list[str]:
        """Flags of the config."""
        return config_flags(self.model, self.tokens, [f"--config.batch_size={self.batch}"] if self.batch > 1 else [])

    def ask(self) -> str:
        """The command of train.py that is advised."""
        config = parse_config(self.flags, "")
        candidate = getattr(advise(config, find_topology(self.pod)), self.advised)
        return command(candidate, config, self.flags)


CASES = [
    Case(pod="h100:1x8", model="llama-3.1-8b", tokens="1M"),
    Case(pod="v5e:16x16", model="llama-3.1-8b", tokens="1M", batch=4),
    Case(pod="v5p:4x4x4", model="llama-3.1-8b", tokens="2M"),
    Case(pod="v6e:16x16", model="llama-3.1-8b", tokens="4M"),
    Case(pod="tpu7x:4x4x4", model="llama-3.1-8b", tokens="128K", batch=128),
    Case(pod="h100:4x8", model="llama-3.1-70b", tokens="512K"),
    Case(pod="v5p:4x4x4", model="llama-3.1-70b", tokens="512K"),
    Case(pod="v6e:16x16", model="llama-3.1-70b", tokens="1M"),
    Case(pod="h100:1x8", model="qwen2.5-7b", tokens="128K", batch=16),
    Case(pod="v5e:16x16", model="qwen2.5-7b", tokens="4M"),
    Case(pod="v5p:4x4x4", model="qwen2.5-7b", tokens="1M", advised=LONGEST),
    Case(pod="v6e:16x16", model="qwen2.5-7b", tokens="1M", advised=LONGEST),
    Case(pod="h100:1x8", model="llama-3.1-8b", tokens="1M", advised=LONGEST),
]


def config_of(line: str) -> TrainConfig:
    """The config of a command of train.py."""
    words = shlex.split(line)
    return parse_config(words[words.index("train.py") + 1 :], "")


def predicted(row: dict) -> int:
    """The bytes of a device that the planner predicts for a command."""
    share = Share.of(config_of(row["command"]), find_topology(row["pod"]))
    return predict(share, share.strategy).total


def compiled_row(case: Case, line: str) -> dict:
    """Compile a command for its pod; the bytes of a device and of its host, or those without which it would not."""
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    config, topology = config_of(line), find_topology(case.pod)
    row = dataclasses.asdict(case) | dict(command=line, memory=topology.chip.memory, has=topology.chip.host_memory)
    try:
        program, seconds = compile_for(config, topology)
        memory = memory_of(program)
        row |= dict(compiler=memory.total, host=memory.host, seconds=seconds)
    except DoesNotFitError as error:
        row |= dict(compiler=error.needed, host=0, seconds=0.0)
    return row | dict(versions=versions())


def table_of(rows: list[dict]) -> Table:
    """Each advised step with the memory that was predicted and that the compiler takes."""
    table = Table(title="Memory of a device, GiB, of the steps that are advised")
    for name in ("plan.py", "advised"):
        table.add_column(name, overflow="fold")
    for name in ("predicted", "compiler", "there is"):
        table.add_column(name, justify="right")
    for row in rows:
        asked = f"{row['model']} --tokens={row['tokens']} --topology={row['pod']}"
        when = row["advised"] if row["now"] else f"{row['advised']}, before"
        asked += f" --config.batch_size={row['batch']}" if row["batch"] > 1 else ""
        options = [word.removeprefix("--config.") for word in shlex.split(row["command"]) if "--config." in word]
        options = [option for option in options if not option.startswith(("batch_size", "eval_sequences"))]
        figures = [row[name] for name in ("predicted", "compiler", "memory")]
        cells = ("ended" if size is None else f"{size / GiB:.1f}" for size in figures)
        table.add_row(asked, f"{when}: {' '.join(options)}", *cells, style="" if enough(row) else "red")
    return table


def enough(row: dict) -> bool:
    """Whether the device's memory, and its host's, is there."""
    return row["compiler"] is not None and row["compiler"] <= row["memory"] and row["host"] <= row["has"]


def main(argv: list[str]) -> int:
    """Advise, compile what is missing, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=local_path, default=Path("advice.json"), help="rows that are done")
    parser.add_argument("--known", action="store_true", help="compile nothing: print the rows that are done")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(row["pod"], row["command"]): row for row in known}
    console, rows = Console(highlight=False), []
    for case in CASES:
        line = case.ask()
        row = done.get((case.pod, line)) or (None if args.known else _compile(case, line, console))
        if row is None:
            console.print(f"left out: {case.model} on {case.pod}, which is not compiled")
            continue
        rows.append(row | dict(now=True))
        write_json(args.out, [*rows, *_others(done, rows)])
    rows += _others(done, rows)
    show(table_of([row | dict(predicted=predicted(row)) for row in rows]), console)
    missing = [row for row in rows if not enough(row)]
    print(f"{len(missing)} of {len(rows)} need more memory than there is, or are not compiled")
    return 1 if missing else 0


def _compile(case: Case, line: str, console: Console) -> dict | None:
    try:
        pod_devices(case.pod)
    except ConfigError:
        return None
    started = multiprocessing.get_context("spawn")
    with console.status(f"compiling {case.model} for {case.pod}"):
        try:
            with ProcessPoolExecutor(1, mp_context=started) as pool:
                return pool.submit(compiled_row, case, line).result()
        except BrokenProcessPool:
            memory = find_topology(case.pod).chip.memory
            ended = dict(command=line, memory=memory, has=0, compiler=None, host=0, seconds=0.0, versions=versions())
            return dataclasses.asdict(case) | ended


def _others(done: dict[tuple[str, str], dict], rows: list[dict]) -> list[dict]:
    """Rows of commands that were advised before predictions changed; they are compiled all the same."""
    keys = {(row["pod"], row["command"]) for row in rows}
    return [row | dict(now=False) for key, row in done.items() if key not in keys]
