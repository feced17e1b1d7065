"""Steps of training, ours beside PyTorch's with transformers: the same model, parameters and tokens, on the CPU.

  pip install -e '.[interop]'  # PyTorch and transformers; without them ours is measured alone
  python -m scripts.benchmarks training
  python -m scripts.benchmarks training --config.model.vocab_size=264 --out=runs/benchmark_bytes

Each trainer is a process of its own, and they take turns, in an order drawn anew for each round. All begin with the
same parameters, which PyTorch reads from a Hugging Face checkpoint, and must have the same losses, step for step.
Ours reads documents and packs them while it computes, PyTorch finds its tokens ready. Tables show medians, and where
the time of a step goes, by a profile of one step. Any field of the config can be set. docs/benchmarks.md shows a run.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import random
import statistics
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from ring_attention.checks import ConfigError, local_path
from ring_attention.commands.arguments import Parser
from ring_attention.json_files import write_json
from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.tables import show
from ring_attention.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from ring_attention.training.config_values import config_to_dict
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.flags import override
from scripts.benchmarks.trainer_process import Step, TrainerProcess
from scripts.benchmarks.trainers import BASELINES, OURS, has_baselines, write_text

DOCUMENTS, WARM_UP = 16, 2
LARGEST_DIFFERENCE = 1e-4
"""Relative difference between losses of the same step above which a trainer computes something else."""


def default_config() -> TrainConfig:
    """Four layers with the vocabulary of Llama 2, a sequence of 8,192 tokens over two devices, one for each core."""
    return TrainConfig(
        name="benchmark_training",
        model=ModelConfig(
            vocab_size=32_000,
            num_layers=4,
            model_dim=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            ffn_dim=768,
            rope=RopeConfig(theta=500_000.0),
            remat="none",
        ),
        seq_len=8192,
        num_steps=1000,
        mesh=MeshConfig(sp=2),
        data=DataConfig(holdout_fraction=0.25),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
    )


def main(argv: list[str]) -> None:
    """Measure all trainers; print tables; write a picture and all numbers."""
    args, config = parse(argv)
    console, kinds = Console(highlight=False), [OURS, *(BASELINES if has_baselines() else ())]
    if len(kinds) == 1:
        print(
            "Note: without PyTorch and transformers ours is measured alone; pip install -e '.[interop]'",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        texts, weights = Path(temporary) / "texts", Path(temporary) / "weights"
        texts.mkdir()
        write_text(texts, config.seq_len, DOCUMENTS)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, paths=f"{texts}/*.txt"))
        columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("starting", total=len(kinds) * (args.repeats + WARM_UP + 2))
            trainers = []
            for kind in kinds:
                bar.update(task, description=kind)
                trainers.append(stack.enter_context(TrainerProcess(kind, config, weights)))
                bar.advance(task)
            steps = take_turns(trainers, args.repeats, lambda: bar.advance(task))
            parts = {}
            for trainer in trainers:
                parts[trainer.kind] = trainer.parts()
                bar.advance(task)
    show(table_of_speed(config, steps), console)
    for kind, seconds in parts.items():
        if kind == OURS or kind == fastest_baseline(steps):
            show(table_of_parts(kind, seconds), console)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(steps, parts, args.out / "training.png")
    write_numbers(config, steps, parts, args.out / "training.json")
    print(f"Written: {args.out}/training.png, {args.out}/training.json")


def take_turns(trainers: list[TrainerProcess], repeats: int, progress) -> dict[str, list[Step]]:
    """Steps of each trainer after the first ones; raises RunError unless the losses of each step agree."""
    steps, order = {trainer.kind: [] for trainer in trainers}, random.Random(0)
    for number in range(WARM_UP + repeats):
        for trainer in order.sample(trainers, len(trainers)):
            steps[trainer.kind].append(trainer.step())
            progress()
        want = steps[OURS][number].loss
        for kind, taken in steps.items():
            if not abs(taken[number].loss - want) <= LARGEST_DIFFERENCE * want:
                raise RunError(f"{kind}: the loss of step {number} is {taken[number].loss:.6f}, ours is {want:.6f}")
    return {kind: taken[WARM_UP:] for kind, taken in steps.items()}


def median(steps: list[Step], field: str = "seconds") -> float:
    """Median of a field of `Step`."""
    return statistics.median(getattr(step, field) for step in steps)


def fastest_baseline(steps: dict[str, list[Step]]) -> str | None:
    """Return the kind of the fastest of the others, if there is one."""
    return min((kind for kind in steps if kind != OURS), key=lambda kind: median(steps[kind]), default=None)


def table_of_speed(config: TrainConfig, steps: dict[str, list[Step]]) -> Table:
    """Time of a step, and how many times as long as ours."""
    model = config.model
    sizes = f"L={model.num_layers} M={model.model_dim} F={model.ffn_dim} V={model.vocab_size:,} "
    heads = f"H={model.num_heads} K={model.num_kv_heads} D={model.head_dim}"
    repeats = len(steps[OURS])
    table = Table(
        title=f"A step of training, {config.seq_len:,} tokens, float32\n{sizes}{heads}",
        caption=f"medians of {repeats} interleaved steps on {cores()} cores; x: times as long as ours",
    )
    for column in ("trainer", "seconds", "least", "x", "CPU seconds", "x", "last loss"):
        table.add_column(column, justify="left" if column == "trainer" else "right")
    for kind, taken in steps.items():
        wall, cpu = median(taken), median(taken, "cpu_seconds")
        x = [f"{median(taken, field) / median(steps[OURS], field):.2f}" for field in ("seconds", "cpu_seconds")]
        least = min(step.seconds for step in taken)
        table.add_row(kind, f"{wall:.2f}", f"{least:.2f}", x[0], f"{cpu:.2f}", x[1], f"{taken[-1].loss:.5f}")
    return table


def table_of_parts(kind: str, parts: dict[str, float]) -> Table:
    """Return where the time of one step went."""
    table = Table(title=f"Where a step's time goes: {kind}")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in parts.items():
        table.add_row(part, f"{seconds:.2f}", f"{seconds / sum(parts.values()):.0%}")
    return table


def draw(steps: dict[str, list[Step]], parts: dict[str, dict[str, float]], path: Path) -> None:
    """A bar for each trainer, as long as its median step, cut into parts as its profile was."""
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(steps)), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(part for shares in parts.values() for part in shares))
    colors = dict(zip(names, plot_colors(len(names)), strict=True))
    left = dict.fromkeys(parts, 0.0)
    for name in names:
        kinds = [kind for kind in parts if name in parts[kind]]
        scale = [median(steps[kind]) / sum(parts[kind].values()) for kind in kinds]
        widths = [parts[kind][name] * factor for kind, factor in zip(kinds, scale, strict=True)]
        axes.barh(kinds, widths, left=[left[kind] for kind in kinds], color=colors[name], label=name)
        for kind, width in zip(kinds, widths, strict=True):
            left[kind] += width
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def plot_colors(count: int) -> list[str]:
    """Colours of parts: attention in blues, then others that can be told apart."""
    colors = ["#1f6fb4", "#8fbfe6", "#e08e2b", "#4a9d5b", "#b5d99c", "#c7a6d6", "#8a5aa8", "#d65f5f", "#a87c4f"]
    colors += ["#e6c84c", "#777777", "#b9bec6", "#dddddd", "#f2b8a0", "#5fb3b3", "#333333"]
    return colors[:count]


def write_numbers(config: TrainConfig, steps: dict[str, list[Step]], parts, path: Path) -> None:
    """All that was measured, with versions."""
    versions = {name: version(name) for name in ("jax", "jaxlib", "torch", "transformers")}
    values = {
        "config": config_to_dict(dataclasses.replace(config, data=DataConfig())),
        "steps": {kind: [dataclasses.asdict(step) for step in taken] for kind, taken in steps.items()},
        "parts": parts,
        "cores": cores(),
        "versions": {"python": platform.python_version(), **versions},
    }
    write_json(path, values)


def version(name: str) -> str | None:
    """Return the version of a distribution, None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parse(argv: list[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Read the flags, and the config with its overrides."""
    parser = Parser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="steps of each that are timed")
    parser.add_argument(
        "--out", type=local_path, default=Path("runs/benchmark_training"), help="folder for the results"
    )
    args, rest = parser.parse_known_args(argv)
    if args.repeats < 1:
        raise ConfigError(f"repeats={args.repeats}: must be positive; give at least 1")
    config = override(default_config(), rest)
    if config.mesh != MeshConfig(sp=config.mesh.sp) or config.mesh.sp < 1 or config.batch_size > 1:
        raise ConfigError("mesh, batch_size: a ring is compared, with one sequence a step; set only mesh.sp of these")
    return args, config
