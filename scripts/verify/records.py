"""The longest contexts that others have trained, beside the longest that the planner predicts here, and compiled.

  pip install -e '.[compile-tpu,compile-gpu]'
  python -m scripts.verify records --out records.json                        # predicted: seconds
  python -m scripts.verify records --out records.json --compile 8B/h100:1x1  # one to nine minutes a cell

Each cell is the whole training step (forward, backward, AdamW) of one sequence on all devices of the pod. The planner
tries every strategy, rematerialisation, number of head groups and `optimizer.offload`; the setting with the longest
context is shown. --compile has the pod's own compiler compile the published length, or --times of it, by the setting
that the planner finds for that. Rows that --out already has, compiled by the same versions, are kept.

The exit status is 1 if a published length does not fit by prediction. docs/records.md shows the table.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from ring_attention.checks import ConfigError, local_path
from ring_attention.commands.arguments import Parser
from ring_attention.hardware.chips import GiB
from ring_attention.hardware.topology import find_topology
from ring_attention.json_files import write_json
from ring_attention.planning.compile_report import compile_for, versions
from ring_attention.planning.hlo.compiled import memory_of as memory_of_program
from ring_attention.planning.memory import memory_of
from ring_attention.planning.plan import EQUAL, by_strategy, longest_context, strategies_of
from ring_attention.planning.shares import Share
from ring_attention.tables import show
from ring_attention.training.config import OFFLOADS, AttentionConfig, OptimizerConfig, TrainConfig
from ring_attention.training.config_values import config_from_dict, config_to_dict
from scripts.verify.published import LLAMA_8B

GOAL = 1.5
"""Times the published length that half of the cells should reach."""

MODELS = {
    "8B": LLAMA_8B,
    "70B": dataclasses.replace(LLAMA_8B, model_dim=8192, num_layers=80, num_heads=64, ffn_dim=28_672),
    "32B": dataclasses.replace(
        LLAMA_8B, model_dim=5120, num_layers=64, num_heads=64, ffn_dim=25_600, vocab_size=151_936, qk_norm=True
    ),
}
"""Llama 3 8B and 70B, Qwen3-32B."""

ALST, UPIPE, MAXTEXT = "ALST", "UPipe", "MaxText's recipe"

CELLS = {
    "8B/h100:1x1": (ALST, 500_000),
    "8B/h100:1x8": (UPIPE, 5_000_000),
    "8B/h100:2x8": (ALST, 8_000_000),
    "8B/h100:4x8": (ALST, 15_500_000),
    "70B/h100:2x8": (ALST, 1_200_000),
    "70B/h100:1x8": (ALST, 200_000),
    "70B/h100:4x8": (ALST, 4_000_000),
    "70B/h100:8x8": (ALST, 10_000_000),
    "32B/h100:1x8": (ALST, 1_550_000),
    "32B/h100:4x8": (ALST, 7_000_000),
    "8B/v5p:4x4x4": (MAXTEXT, 10_500_000),
    "8B/tpu7x:4x4x4": (MAXTEXT, 10_500_000),
}
"""Model and pod -> who published it, and tokens. ALST's 3.8M of the 8B on 8 H100 are fewer than UPipe's."""

TILES = 1024
"""Tokens of splash's tiles: it keeps a table of all in 1 MiB of scalar memory, which half as many would overflow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A setting, and the longest context that fits by it.

    Attributes:
      config: of a step of that many tokens.
      tokens: of the context.
    """

    config: TrainConfig
    tokens: int

    @property
    def words(self) -> str:
        """The setting in a few words."""
        model, attention = self.config.model, self.config.attention
        options = "".join(f" {x}" for x in (attention.ulysses_size, attention.head_groups) if x)
        groups = f", head_groups={model.head_groups}" if model.head_groups > 1 else ""
        return f"{attention.strategy}{options}, {model.remat}{groups}, offload={self.config.optimizer.offload}"


def settings_of(cell: str, tokens: int):
    """Yield the shares of a cell's step with each setting that the pod can run, whatever its memory."""
    model, pod = cell.split("/")
    topology, shape = find_topology(pod), MODELS[model]
    attention = AttentionConfig(impl="splash", block_q=TILES, block_kv=TILES) if topology.tpu else AttentionConfig()
    attention = attention if topology.tpu else dataclasses.replace(attention, impl="cudnn")
    grain = 2048 * topology.devices
    for remat, groups, offload in itertools.product(("offload", "offload_input"), (1, 2, 4, 8), OFFLOADS):
        config = TrainConfig(
            name=cell,
            model=dataclasses.replace(shape, remat=remat, head_groups=groups),
            seq_len=-(-tokens // grain) * grain,
            num_steps=1000,
            attention=attention,
            optimizer=OptimizerConfig(offload=offload),
        )
        try:
            share = Share.of(config, topology)
        except ConfigError:
            continue
        yield from (by_strategy(share, strategy) for strategy in strategies_of(share))


def longest(cell: str) -> Found:
    """Find the setting with the longest context by prediction; of those as good, the ring that offloads least."""
    found = [
        Found(config=share.config, tokens=longest_context(share.config, share.topology))
        for share in settings_of(cell, CELLS[cell][1])
    ]
    most = max(x.tokens for x in found)
    equal = [x for x in found if x.tokens >= (1 - EQUAL) * most]
    return min(equal, key=lambda x: (x.config.attention.strategy != "ring", OFFLOADS.index(x.config.optimizer.offload)))


def compile_cell(cell: str, times: float) -> dict:
    """Compile a multiple of the published length, by the setting that reaches furthest."""
    topology, best = find_topology(cell.split("/")[1]), longest(cell).config
    grain = 2048 * topology.devices
    config = dataclasses.replace(best, seq_len=-(-int(times * CELLS[cell][1]) // grain) * grain)
    start, program = time.monotonic(), memory_of_program(compile_for(config, topology)[0])
    return dict(
        cell=cell,
        times=times,
        device=program.total,
        host=program.host,
        config=config_to_dict(config),
        seconds=round(time.monotonic() - start),
        versions=versions(),
    )


def bound_of(found: Found, cell: str) -> str:
    """Say which memory ends the context, the device's or its host's, and what takes most of it."""
    topology = find_topology(cell.split("/")[1])
    share = Share.of(dataclasses.replace(found.config, seq_len=found.tokens), topology)
    memory, chip = memory_of(share, share.strategy), topology.chip
    if memory.host / chip.host_memory > memory.total / chip.memory:
        return "the host's memory"
    return max(memory.parts, key=lambda name: memory.parts[name])


def predicted_table(found: dict[str, Found]) -> Table:
    """Published beside predicted."""
    table = Table(title="Longest context, millions of tokens", caption="bound: what ends it by the prediction")
    for name in ("model/pod", "who", "published", "here", "times", "setting", "bound"):
        table.add_column(name, justify="right" if name in ("published", "here", "times") else "left")
    for cell, best in found.items():
        who, tokens = CELLS[cell]
        times, style = best.tokens / tokens, "" if best.tokens >= tokens else "red"
        cells = (f"{tokens / 1e6:.2f}", f"{best.tokens / 1e6:.2f}", f"{times:.2f}", best.words, bound_of(best, cell))
        table.add_row(cell, who, *cells, style=style)
    return table


def compiled_table(rows: list[dict]) -> Table:
    """What the pods' own compilers say, beside the prediction."""
    table = Table(
        title="Compiled", caption="GiB of a device and of its host, predicted beside the compiler's, of how many"
    )
    for name in ("model/pod", "tokens", "device", "host", "fits", "setting"):
        table.add_column(name, justify="right" if name in ("tokens", "device", "host") else "left")
    for row in rows:
        config, topology = config_from_dict(row["config"]), find_topology(row["cell"].split("/")[1])
        share, chip = Share.of(config, topology), topology.chip
        memory = memory_of(share, share.strategy)
        device = f"{memory.total / GiB:.1f} | {row['device'] / GiB:.1f} of {chip.memory / GiB:.0f}"
        host = f"{memory.host / GiB:.1f} | {row['host'] / GiB:.1f} of {chip.host_memory / GiB:.0f}"
        fits = "yes" if row["device"] <= chip.memory and row["host"] <= chip.host_memory else "no"
        words = Found(config=config, tokens=config.seq_len).words
        table.add_row(row["cell"], f"{config.seq_len:,}", device, host, fits, words)
    return table


def main(argv: list[str]) -> int:
    """Predict all cells, compile those named, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=local_path, default=Path("records.json"), help="rows that are compiled")
    parser.add_argument("--compile", nargs="+", choices=CELLS, default=[], metavar="CELL", help="which to compile")
    parser.add_argument("--times", type=float, default=1.0, help="of the published length, to compile")
    args = parser.parse_args(argv)
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    console = Console(highlight=False)
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    for cell in args.compile:
        known = [(row["cell"], row["times"], row["versions"]) for row in rows]
        if (cell, args.times, versions()) not in known:
            with console.status(f"compiling {cell}"):
                rows.append(compile_cell(cell, args.times))
            write_json(args.out, rows)
    found = {cell: longest(cell) for cell in CELLS}
    show(predicted_table(found), console)
    show(compiled_table(rows), console)
    ratios = [best.tokens / CELLS[cell][1] for cell, best in found.items()]
    reached, further = (sum(x >= goal for x in ratios) for goal in (1, GOAL))
    print(f"{reached} of {len(ratios)} reach the published length, {further} of them {GOAL} times that")
    return 0 if min(ratios) >= 1 else 1
