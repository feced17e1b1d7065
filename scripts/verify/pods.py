"""Does a ring overlap on pods that are not there? Compiles for each, reads the programs and prints a table.

  pip install -e '.[compile-tpu,compile-gpu]'
  python -m scripts.verify pods --out pods.json
  python -m scripts.verify pods v5e:4x4

For each pod two programs: ring attention over all of its devices, forward and backward, and the whole training step of
a small Transformer. Required of each: rings whose hops are one link long (on TPU), no synchronous permute, and work
between the start and the end of every other. The last line says whether all of that was found; the exit status is 1 if
it was not. docs/kernels.md shows the table.
"""

import dataclasses
import time

from rich.table import Table

from ring_attention.attention.blocks import BlockSizes
from ring_attention.hardware.pods import pod_devices
from ring_attention.models.config import ModelConfig
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.wires import hops_of
from ring_attention.planning.hlo import transfers
from ring_attention.planning.programs import compile_ring, compile_step
from ring_attention.training.config import AttentionConfig, TrainConfig
from scripts.verify.each_pod import compile_for_each

PODS = ("v5e:16x16", "v4:8x8x8", "v5p:8x8x16", "v6e:16x16", "h100:4x8")
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 8, 128, 4
TILES = BlockSizes(q=256, kv=256, heads=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled program.

    Attributes:
      pod: what it was compiled for.
      program: "ring" or "step".
      kernel: that computed its hops.
      devices: how many.
      links: of the longest hop; 0 where the compiler's devices have no coordinates.
      overlap: what its permutes lie beside.
      temporary_bytes: of a device.
      seconds: that compilation took.
    """

    pod: str
    program: str
    kernel: str
    devices: int
    links: int
    overlap: transfers.Overlap
    temporary_bytes: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether it is as required."""
        return self.links <= 1 and self.overlap.synchronous == self.overlap.exposed == 0


def small_step(devices: int, shard: int, kernel: str) -> TrainConfig:
    """A Transformer whose layers are as wide as the ring of attention alone, on a ring of all devices."""
    model = ModelConfig(
        vocab_size=32_000,
        num_layers=LAYERS,
        model_dim=HEADS * HEAD_DIM,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        ffn_dim=4 * HEADS * HEAD_DIM,
        compute_dtype="bfloat16",
    )
    attention = AttentionConfig(impl=kernel, block_q=TILES.q, block_kv=TILES.kv, block_heads=TILES.heads)
    return TrainConfig(name="small", model=model, attention=attention, seq_len=devices * shard, num_steps=1000)


def check(pod: str, shard: int):
    """Compile and read both programs."""
    devices = pod_devices(pod)
    kernel = "cudnn" if devices[0].platform == "gpu" else "splash"
    sizes = dict(shard=shard, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    programs = {
        "ring": lambda: compile_ring(devices, **sizes, layout="zigzag", impl=kernel, block_sizes=TILES),
        "step": lambda: compile_step(small_step(len(devices), shard, kernel), devices),
    }
    for name, compile_program in programs.items():
        start = time.monotonic()
        program = compile_program()
        yield Row(
            pod=pod,
            program=name,
            kernel=kernel,
            devices=len(devices),
            links=hops_of(make_mesh(sp=-1, devices=devices)).links,
            overlap=transfers.overlap_of(program.as_text()),
            temporary_bytes=program.memory_analysis().temp_size_in_bytes,
            seconds=round(time.monotonic() - start, 1),
        )


def table_of(rows: list[Row], shard: int) -> Table:
    """Return the rows for a reader."""
    sizes = f"t={shard}, H={HEADS}, K={KV_HEADS}, D={HEAD_DIM}, {LAYERS} layers"
    table = Table(
        title=f"Rings compiled for pods, bfloat16, zigzag, {sizes}",
        caption="permutes in the program's text; hop: a hop is computed beside it; other: other work of its size is; "
        "hidden by nothing: neither",
    )
    for name in ("pod", "program", "kernel"):
        table.add_column(name)
    for name in ("links", "sync", "async", "hop", "other", "nothing", "temp MiB", "compile"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        found = row.overlap
        counts = (found.synchronous, found.asynchronous, found.hidden, found.beside_other_work)
        exposed = f"{found.exposed}" + f" ({found.exposed_bytes / 2**10:.0f} KiB)" * (found.exposed > 0)
        numbers = [
            str(row.links or "-"),
            *map(str, counts),
            exposed,
            f"{row.temporary_bytes / 2**20:.0f}",
            f"{row.seconds:.0f} s",
        ]
        table.add_row(row.pod, row.program, row.kernel, *numbers, style="" if row.fits else "red")
    return table


def main(argv: list[str]) -> int:
    """Compile, print, write."""
    rows = compile_for_each(argv, __doc__, PODS, 2048, check, table_of)
    failed = [f"{row.pod} {row.program}" for row in rows if not row.fits]
    print(f"not as required: {', '.join(failed)}" if failed else "all as required")
    return int(bool(failed))
