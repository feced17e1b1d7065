"""The run under test: how it is started, and what can be read off its folder from outside."""

import dataclasses
import itertools
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .life import Child, Life
from .verdicts import Line, read_lines

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIG = REPOSITORY / "configs/tiny.py"
UNFINISHED = ".orbax-checkpoint-tmp"  # orbax writes to STEP + this, and renames it once all is there
RESUMED = re.compile(r"^Going on from step (\d+)\.", re.MULTILINE)
STEP = re.compile(rb'\{"step": (\d+),')
TAIL = 4096  # bytes, more than ten lines of metrics.jsonl
DONE = re.compile(r"^step +(\d+)/", re.MULTILINE)
CHECKPOINT_EVERY = 3
SEVERAL, STEPS_OF_SEVERAL = 4, 80
"""Processes of a run that is shared, and its steps: on few cores they mostly wait for each other."""

MESHES = (
    ("--config.mesh.fsdp=1", "--config.mesh.sp=4", "--config.mesh.tp=1", "--config.attention.layout=striped"),
    ("--config.mesh.fsdp=2", "--config.mesh.sp=4", "--config.mesh.tp=1", "--config.attention.layout=contiguous"),
    ("--config.mesh.fsdp=1", "--config.mesh.sp=2", "--config.mesh.tp=1", "--config.attention.layout=zigzag"),
)
"""4, 2x4 and 2 devices, each in another layout; configs/tiny.py has 2x2x2 in zigzag."""


class Folder:
    """A run's folder, as anyone may read it."""

    def __init__(self, path: Path):
        self.path, self.checkpoints_path = path, path / "checkpoints"

    def lines(self) -> list[Line]:
        """The whole lines of metrics.jsonl, [] if there is none; ValueError if one is not JSON."""
        try:
            return read_lines((self.path / "metrics.jsonl").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []

    def steps_done(self) -> int:
        """The last step with a loss, 0 if there is none; it is asked often, and looks at the end of the file only."""
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                *lines, _torn = file.read().split(b"\n")
        except FileNotFoundError:
            return 0
        steps = [STEP.match(line) for line in lines if b'"loss"' in line]
        return max((int(found[1]) for found in steps if found), default=0)

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, oldest first."""
        return sorted(int(name) for name in self._names() if name.isdigit())

    def newest(self) -> int:
        """The last of `checkpoints`, 0 if there is none: where a run starts."""
        return max(self.checkpoints(), default=0)

    def begun(self) -> int:
        """The step of the newest checkpoint, written to its end or not, 0 if there is none."""
        return max([self.newest(), *(int(name.partition(".")[0]) for name in self.unfinished())])

    def unfinished(self) -> list[str]:
        """Names of the checkpoints that are being written, or never were to their end."""
        return [name for name in self._names() if UNFINISHED in name]

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.checkpoints_path)
        except FileNotFoundError:
            return []


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A command that trains, and how long it does so.

    Attributes:
      command: all but the folder, and which of several processes it is.
      poison: a command that puts an infinite number into a layer of a folder's newest checkpoint.
      env: of its processes.
      logs: folder of what they print.
      num_steps: of the whole run.
      checkpoint_every: steps between two checkpoints.
      processes: that share a run, joined over the loopback.
      numbers: counts the starts, for the names of the logs.
    """

    command: Sequence[str]
    poison: Sequence[str]
    env: Mapping[str, str]
    logs: Path
    num_steps: int
    checkpoint_every: int = CHECKPOINT_EVERY
    processes: int = 1
    numbers: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    def start(self, folder: Path, *, flags: Sequence[str] = (), prefix: Sequence[str] = ()) -> Life:
        """Start the run in `folder`, or go on with it.

        Args:
          folder: of the run.
          flags: more of them.
          prefix: a command that executes the one after it, in a place where the disk is small.
        """
        command = [*prefix, *self.command, f"--config.run_dir={folder}", *flags]
        number = next(self.numbers)
        if self.processes == 1:
            return Life([self._child(command, f"{number:04}")])
        command += [f"--coordinator_address=127.0.0.1:{_free_port()}", f"--num_processes={self.processes}"]
        members = range(self.processes)
        return Life([self._child([*command, f"--process_id={i}"], f"{number:04}-{i}") for i in members])

    def start_poisoning(self, folder: Path, layer: int) -> Life:
        """Start to make a weight of `layer` infinite in the newest checkpoint of `folder`."""
        command = [*self.poison, f"--config.run_dir={folder}", f"--layer={layer}"]
        return Life([self._child(command, f"{next(self.numbers):04}-poison")])

    def _child(self, command: Sequence[str], name: str) -> Child:
        return Child(command, env=self.env, log=self.logs / name, cwd=REPOSITORY)


def make_trainers(out: Path, num_steps: int) -> dict[int, Trainer]:
    """train.py on configs/tiny.py, smaller still, with the library's own sources to learn from.

    What one start compiles the next ones find in a cache, so that a start costs the imports.

    Args:
      out: a folder for the sources, the logs and the cache.
      num_steps: of a run of one process.

    Returns:
      a trainer for each number of processes; for several of them a ring that crosses their borders, and fewer steps.
    """
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for file in sorted(REPOSITORY.glob("ring_attention/*/*.py")):
        (corpus / f"{file.parent.name}_{file.stem}.txt").write_bytes(file.read_bytes() + b"\n")
    one = Trainer(
        command=[sys.executable, str(REPOSITORY / "train.py"), f"--config={CONFIG}", *_flags(corpus, num_steps)],
        poison=[sys.executable, "-m", "scripts.verify.soak.poison"],
        env=_environment(out),
        logs=out / "logs",
        num_steps=num_steps,
    )
    fewer = min(num_steps, STEPS_OF_SEVERAL)
    ring = ["--config.mesh.fsdp=1", f"--config.mesh.sp={SEVERAL}", "--config.mesh.tp=1", f"--config.num_steps={fewer}"]
    several = dataclasses.replace(one, command=[*one.command, *ring], num_steps=fewer, processes=SEVERAL)
    return {1: one, SEVERAL: several}


def _flags(corpus: Path, num_steps: int) -> list[str]:
    fields = {
        "data.paths": f"{corpus}/*.txt",
        "data.holdout_fraction": 0.3,
        "data.streams": 4,
        "seq_len": 64,
        "attention.block_q": 8,
        "attention.block_kv": 8,
        "num_steps": num_steps,
        "log_every": 1,
        "eval_every": 20,
        "checkpoint_every": CHECKPOINT_EVERY,
    }
    return [f"--config.{name}={value}" for name, value in fields.items()]


def _environment(out: Path) -> dict[str, str]:
    extra = {
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    return {"JAX_PLATFORMS": "cpu"} | os.environ | extra


def resumed_step(life: Life) -> int:
    """The step that a run says it goes on from, 0 if it says none; ValueError if its processes disagree."""
    steps = set(map(int, RESUMED.findall(life.stdout)))
    if len(steps) > 1:
        raise ValueError(f"processes of one run go on from steps {sorted(steps)}")
    return steps.pop() if steps else 0


def steps_trained(life: Life) -> int:
    """Steps that these processes have done themselves."""
    return len(set(DONE.findall(life.stdout)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
