"""Is the planner's memory the compiler's? Compiles configs for pods and compares.

  pip install -e '.[compile-tpu,compile-gpu]'
  python -m scripts.verify prediction --out prediction.json
  python -m scripts.verify prediction --pods 2xv5e h100:3x8    # those alone

Each case is a config with some fields changed, one to three minutes on two cores. Rows that --out already has are not
compiled again, but predicted again. The exit status is 1 if a prediction is off by more than 15%.
"""

import dataclasses
import json
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.hardware.chips import GiB
from ring_attention.hardware.topology import find_topology
from ring_attention.json_files import write_json
from ring_attention.planning.compile_report import compile_for
from ring_attention.planning.hlo.compiled import memory_of as memory_of_program
from ring_attention.planning.memory import memory_of
from ring_attention.planning.shares import Share
from ring_attention.tables import show
from ring_attention.training.flags import parse_config

TOLERANCE = 0.15
TPU, GPU = "configs/tpu_v5e_256_7b.py", "configs/gpu_8xh100_7b.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A config on a pod; `fields` are changed, names shortened as the last part of theirs, after a preset if any."""

    pod: str
    config: str
    fields: str

    def share(self) -> Share:
        """A device's part of it."""
        topology = find_topology(self.pod)
        kernel = "splash" if topology.tpu else "cudnn"
        flags = [f"--config={self.config}", f"--config.attention.impl={kernel}"]
        flags += [f"--config.{_LONG.get(name, name)}={value}" for name, value in self._pairs()]
        return Share.of(parse_config(flags, TPU), topology)

    def _pairs(self):
        return [field.split("=") for field in self.fields.split() if "=" in field]


_LONG = {name: f"model.{name}" for name in ("num_layers", "num_kv_heads", "remat", "model_dim", "ffn_dim", "num_heads")}
_LONG |= {"vocab_size": "model.vocab_size"} | {axis: f"mesh.{axis}" for axis in ("dp", "fsdp", "sp", "tp")}
_LONG |= {name: f"attention.{name}" for name in ("impl", "strategy", "ulysses_size", "block_q", "block_kv")}
_LONG |= {"head_groups": "model.head_groups", "offload": "optimizer.offload"}
_OFFLOADED = "remat=offload_input offload=parameters"
_SMALL = "num_layers=12 model_dim=1024 ffn_dim=4096 num_heads=8 num_kv_heads=8 vocab_size=131072"


def _config_of(pod: str, fields: str) -> str:
    """Return the preset that the fields begin with, or the pod's own config."""
    first = fields.partition(" ")[0]
    return first if first and "=" not in first else TPU if find_topology(pod).tpu else GPU


CASES = [
    Case(pod=pod, config=_config_of(pod, fields), fields=fields)
    for pod, fields in (
        ("v5e:16x16", ""),
        ("v5e:4x4", "num_layers=8 sp=16 seq_len=131072"),
        ("v5e:4x4", "num_layers=8 sp=16 seq_len=131072 impl=xla"),
        ("v5e:4x4", "num_layers=8 sp=16 seq_len=262144 remat=full"),
        ("v5e:4x4", "num_layers=2 sp=16 seq_len=131072 remat=none"),
        ("v5e:4x4", "num_layers=8 sp=4 tp=4 seq_len=65536"),
        ("v5e:4x4", "num_layers=8 sp=4 fsdp=4 batch_size=4 eval_sequences=4 seq_len=32768"),
        ("v5e:4x4", "num_layers=4 sp=16 seq_len=131072 strategy=all_gather"),
        ("v5e:4x4", "num_layers=4 sp=16 seq_len=131072 strategy=usp ulysses_size=4"),
        ("v5e:4x4", "num_layers=16 sp=16 seq_len=131072 num_kv_heads=32"),
        ("v4:4x4x4", "sp=64 seq_len=786432 num_kv_heads=32"),
        ("v4:2x2x4", "num_layers=16 sp=16 seq_len=196608 num_kv_heads=32"),
        ("v4:2x2x4", "num_layers=16 sp=16 seq_len=393216 num_kv_heads=32 remat=full"),
        ("v4:8x8x8", "sp=512 seq_len=3276800"),
        ("v6e:16x16", "seq_len=3932160"),
        ("v5p:8x8x16", "sp=1024 seq_len=6553600"),
        ("v6e:2x4", f"{_SMALL} sp=8 seq_len=65536"),
        ("h100:1x8", ""),
        ("h100:1x8", "impl=xla"),
        ("h100:1x8", "num_layers=8 sp=4 tp=2"),
        ("h100:4x8", "sp=32 seq_len=1048576 remat=full"),
        ("h100:1x8", f"{_SMALL} seq_len=65536"),
        ("h100:3x8", "num_layers=8 sp=24 seq_len=786432"),
        ("h100:3x8", "num_layers=12 fsdp=3 sp=4 tp=2 batch_size=3 eval_sequences=3 seq_len=131072"),
        ("h100:5x8", "num_layers=16 sp=40 seq_len=655360 remat=full"),
        ("h200:1x8", "num_layers=16 seq_len=524288"),
        ("b200:1x8", "num_layers=16 fsdp=2 sp=2 tp=2 batch_size=2 seq_len=131072"),
        ("gb200:1x72", "num_layers=8 sp=72 seq_len=2359296"),
        ("2xv5e:4x4", "num_layers=8 dp=2 sp=16 batch_size=2 seq_len=131072"),
        ("2xv5e:4x4", "num_layers=8 sp=32 seq_len=262144"),
        ("3xv5e:2x4", "num_layers=8 sp=24 seq_len=196608"),
        ("v5e:4x4", "num_layers=8 fsdp=2 sp=4 tp=2 batch_size=2 seq_len=65536"),
        ("v5p:4x4x4", "num_layers=16 fsdp=4 sp=8 tp=2 batch_size=4 eval_sequences=4 seq_len=131072"),
        ("h100:1x1", f"llama-3.1-8b sp=1 seq_len=524288 head_groups=8 {_OFFLOADED}"),
        ("h100:1x1", f"llama-3.1-8b num_layers=4 sp=1 seq_len=65536 {_OFFLOADED}"),
        ("h100:1x1", f"llama-3.1-8b num_layers=4 vocab_size=8192 sp=1 seq_len=8192 {_OFFLOADED}"),
        ("h100:1x8", f"llama-3.1-70b sp=8 seq_len=262144 head_groups=8 {_OFFLOADED}"),
        ("v5p:2x2x2", f"llama-3.1-8b sp=8 seq_len=524288 block_q=512 block_kv=512 {_OFFLOADED}"),
        ("v5p:4x4x8", "gemma3_27b"),
    )
]


def table_of(rows: list[dict]) -> Table:
    """Prediction beside the compiler's figure."""
    table = Table(title="Memory of a device, GiB")
    for name in ("pod", "changed in the config"):
        table.add_column(name, overflow="fold")
    for name in ("predicted", "compiler", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = row["predicted"] / row["compiler"]
        style = "red" if abs(ratio - 1) > TOLERANCE else ""
        cells = (f"{row[name] / GiB:.2f}" for name in ("predicted", "compiler"))
        table.add_row(row["pod"], row["fields"] or "-", *cells, f"{ratio:.2f}", style=style)
    return table


def main(argv: list[str]) -> int:
    """Compile what is missing, predict, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=local_path, default=Path("prediction.json"), help="rows that are done")
    parser.add_argument("--pods", nargs="+", metavar="NAME", default=[""], help="only of pods that begin so")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    compiled = {(row["pod"], row["fields"]): row["compiler"] for row in known}
    console, rows = Console(highlight=False), []
    for case in (case for case in CASES if case.pod.startswith(tuple(args.pods))):
        share, key = case.share(), (case.pod, case.fields)
        if key not in compiled:
            with console.status(f"compiling {case.pod} {case.fields}"):
                compiled[key] = memory_of_program(compile_for(share.config, share.topology)[0]).total
        predicted = memory_of(share, share.config.attention.make_strategy()).total
        rows.append(dict(pod=case.pod, fields=case.fields, predicted=predicted, compiler=compiled[key]))
        done = [(row["pod"], row["fields"]) for row in rows]
        write_json(args.out, rows + [row for row in known if (row["pod"], row["fields"]) not in done])
    show(table_of(rows), console)
    off = [row for row in rows if abs(row["predicted"] / row["compiler"] - 1) > TOLERANCE]
    print(f"{len(off)} of {len(rows)} are off by more than {TOLERANCE:.0%}")
    return 1 if off else 0
