"""Compiles Table 3 of the Ring Attention paper: does its longest context fit, and does four times as much.

  pip install -e '.[compile-tpu,compile-gpu]'
  python -m scripts.verify table3 --out table3.json
  python -m scripts.verify table3 --cells 7B/v5e:16x16 13B/a100:4x8 --times 1 2 4

Each cell is the whole training step (forward, backward, AdamW) of a LLaMA model with as many key/value heads as query
heads, one sequence on all devices of the pod, compiled by the pod's own compiler on this machine. It fits if the
compiler accepts it, the bytes of a device stay below its memory and those on the host below the host's memory over its
devices (hardware/chips.py). XLA for GPU refuses nothing: there its total is compared with 79 GiB, what the driver
leaves of 80. Rows that --out already has, compiled by the same versions, are not compiled again.

The exit status is 1 if a context of the paper does not fit. docs/table3.md shows the table.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from ring_attention.attention.blocks import BlockSizes
from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.hardware.chips import CHIPS, GiB
from ring_attention.hardware.pods import pod_devices
from ring_attention.json_files import write_json
from ring_attention.planning.compile_report import needed_bytes, versions
from ring_attention.planning.programs import compile_step
from ring_attention.tables import show
from ring_attention.training.config import AttentionConfig, TrainConfig
from scripts.verify.published import LLAMA_7B

GPU_MEMORY = 79 * GiB

MODELS = {
    "3B": dataclasses.replace(LLAMA_7B, model_dim=3072, num_layers=28, num_heads=24, num_kv_heads=24, ffn_dim=8192),
    "7B": LLAMA_7B,
    "13B": dataclasses.replace(LLAMA_7B, model_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, ffn_dim=13_824),
    "30B": dataclasses.replace(LLAMA_7B, model_dim=6656, num_layers=60, num_heads=52, num_kv_heads=52, ffn_dim=17_920),
}
"""LLaMA's models. 3B is as wide and deep as Llama 3.2 3B: OpenLLaMA's 3200 does not divide by rings of 256 and 512."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the table.

    Attributes:
      paper: longest context that the paper's ring reaches, in units of 1024 tokens.
      remat: see `ModelConfig`.
      head_groups: see `ModelConfig`.
      impl: kernel, "" for that of the platform.
      block_q, block_kv: see `AttentionConfig`; splash keeps a table of all tiles, for which there is 1 MiB.
    """

    paper: int
    remat: str = "offload"
    head_groups: int = 1
    impl: str = ""
    block_q: int = BlockSizes.q
    block_kv: int = BlockSizes.kv


CELLS = {
    "3B/a100:1x8": Cell(paper=512),
    "7B/a100:1x8": Cell(paper=256),
    "13B/a100:1x8": Cell(paper=128),
    "7B/a100:4x8": Cell(paper=4096, remat="offload_input", head_groups=8),
    "13B/a100:4x8": Cell(paper=2048, remat="offload_input", head_groups=8),
    "7B/v3:16x16": Cell(paper=2048, impl="xla"),  # Mosaic has no bfloat16 products for v3
    "13B/v3:16x16": Cell(paper=1024, impl="xla"),
    "3B/v4:8x8x8": Cell(paper=16_384, remat="offload_input", head_groups=8, block_q=1024, block_kv=1024),
    "7B/v4:8x8x8": Cell(paper=8192),
    "13B/v4:8x8x8": Cell(paper=4096),
    "30B/v4:8x8x8": Cell(paper=2048),
    "3B/v5e:16x16": Cell(paper=4096, remat="offload_input", head_groups=8, block_q=512, block_kv=1024),
    "7B/v5e:16x16": Cell(paper=2048),
}
"""Model and topology -> cell: the ring's column of Table 3. TPUv3-512 and TPUv4-1024 count cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled step.

    Attributes:
      cell: a name of CELLS.
      times: multiple of the paper's context.
      tokens: of the sequence.
      fits: whether it does.
      needed, memory: bytes of a device that it takes, and that there are.
      state: of `needed`, parameters, optimizer and batch; 0 where the compiler refused.
      host, host_memory: bytes of the host for a device that it takes, and that there are.
      bound: what comes nearest to its limit, in words.
      settings: of the cell.
      seconds: that compilation took.
      versions: of what compiled it.
    """

    cell: str
    times: int
    tokens: int
    fits: bool
    needed: int
    memory: int
    state: int
    host: int
    host_memory: int
    bound: str
    settings: dict
    seconds: float
    versions: dict


def config_of(name: str, times: int) -> TrainConfig:
    """Return the step of a cell at a multiple of the paper's context."""
    (model, topology), cell = name.split("/"), CELLS[name]
    gpu = not topology.startswith("v")
    return TrainConfig(
        name=f"{model} x{times}",
        model=dataclasses.replace(MODELS[model], remat=cell.remat, head_groups=cell.head_groups),
        seq_len=times * cell.paper * 1024,
        num_steps=10_000,
        attention=AttentionConfig(
            layout="zigzag",
            impl=cell.impl or ("cudnn" if gpu else "splash"),
            block_q=cell.block_q,
            block_kv=cell.block_kv,
            block_heads=BlockSizes.heads,
        ),
    )


def versions_of(name: str) -> dict[str, str]:
    """Versions of what compiles a cell, as far as it is installed."""
    compilers = ["libtpu"] if "/v" in name else ["jax-cuda13-plugin", "jax-cuda12-plugin"]
    return versions(["jax", "jaxlib", *compilers])


def key_of(name: str, times: int, settings: dict, versions: dict) -> str:
    """Return what makes a row the same as another."""
    return json.dumps([name, times, settings, versions], sort_keys=True)


def compile_row(name: str, times: int) -> Row:
    """Compile a cell at a multiple of the paper's context."""
    topology = name.split("/")[1]
    chip, config = CHIPS[topology.partition(":")[0]], config_of(name, times)
    memory = int(chip.memory) if chip.platform == "tpu" else GPU_MEMORY
    devices, start = pod_devices(topology), time.monotonic()
    state, host, refusal = 0, 0, ""
    try:
        analysis = compile_step(config, devices).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        refusal = str(error)
        needed = int(needed_bytes(refusal) or 0)  # 0: it failed for another reason
    else:
        state, host = analysis.argument_size_in_bytes, analysis.host_temp_size_in_bytes
        needed = state + analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    bound = bound_of(needed / memory, state / max(needed, 1), host / chip.host_memory)
    return Row(
        cell=name,
        times=times,
        tokens=config.seq_len,
        fits=not refusal and needed <= memory and host <= chip.host_memory,
        needed=needed,
        memory=memory,
        state=state,
        host=host,
        host_memory=int(chip.host_memory),
        bound=bound if needed else f"the compiler failed: {refusal.partition(chr(10))[0][:200]}",
        settings=dataclasses.asdict(CELLS[name]),
        seconds=round(time.monotonic() - start, 1),
        versions=versions_of(name),
    )


def bound_of(device: float, state: float, host: float) -> str:
    """Return what comes nearest to its limit, given shares of both memories and the state's of what is on a device."""
    if host > device:
        return "what is kept on the host"
    return "parameters and optimizer" if state > 0.5 else "one layer's activations"


def table_of(rows: list[Row]) -> Table:
    """Return the rows for a reader."""
    table = Table(
        title="Table 3 of the Ring Attention paper, compiled",
        caption="GiB of a device and of its host, of how many; context in units of 1024 tokens",
    )
    for name in ("model/hardware", "paper", "times", "context", "fits", "device GiB", "host GiB", "compile"):
        table.add_column(name, no_wrap=True, justify="left" if name == "model/hardware" else "right")
    table.add_column("nearest to its limit")
    for row in rows:
        table.add_row(
            row.cell,
            str(CELLS[row.cell].paper),
            f"{row.times}x",
            str(row.tokens // 1024),
            "yes" if row.fits else "no",
            f"{row.needed / GiB:.1f} of {row.memory / GiB:.1f}",
            f"{row.host / GiB:.1f} of {row.host_memory / GiB:.0f}",
            f"{row.seconds:.0f} s",
            row.bound,
            style="" if row.fits else "red",
        )
    return table


def read(path: Path | None) -> dict[str, Row]:
    """Rows of an earlier run, by key."""
    if path is None or not path.exists():
        return {}
    rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    return {key_of(row.cell, row.times, row.settings, row.versions): row for row in rows}


def main(argv: list[str]) -> int:
    """Compile, write, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--cells", nargs="+", default=[*CELLS], choices=CELLS, metavar="MODEL/TOPOLOGY")
    parser.add_argument("--times", nargs="+", type=int, default=[1, 4], metavar="N", help="multiples of the paper's")
    parser.add_argument(
        "--out", type=local_path, help="JSON of rows, written after each; what is there is not done again"
    )
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    # Triton's tiles are chosen by trying them, and there is no GPU to try them on; of some shapes it finds none.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()
    console, known, rows = Console(highlight=False), read(args.out), []
    wanted = [(name, times) for name in args.cells for times in args.times]
    for number, (name, times) in enumerate(wanted, 1):
        key = key_of(name, times, dataclasses.asdict(CELLS[name]), versions_of(name))
        if key not in known:
            with console.status(f"{number} of {len(wanted)}: compiling {name} at {times}x the paper's context"):
                known[key] = compile_row(name, times)
        rows.append(known[key])
        if args.out:
            flat = [dataclasses.asdict(row) for row in known.values()]
            write_json(args.out, flat)
    show(table_of(rows), console)
    failed = [row.cell for row in rows if row.times == 1 and not row.fits]
    print(
        f"the paper's context does not fit: {', '.join(failed)}"
        if failed
        else "every context of the paper that was compiled fits"
    )
    return int(bool(failed))
