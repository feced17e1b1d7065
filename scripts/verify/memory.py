"""Compiles a 7B step for rings of 16 to 512 devices with as many tokens on each, and compares the memory of a device.

  pip install -e '.[compile-tpu]'
  python -m scripts.verify memory --out memory.json

The pods are of TPU v4. Parameters and optimizer are divided by the devices and shrink, and so does what the step makes
of them: float32 gradients and updates and a bfloat16 copy, 10 bytes a parameter. The other temporaries, activations and
the weights of the layer at hand, must not differ by more than 5% between the smallest ring and any other; the exit
status is 1 if they do. docs/table3.md shows the table.
"""

import dataclasses
import time

from rich.table import Table

from ring_attention.hardware.chips import GiB
from ring_attention.hardware.pods import pod_devices
from ring_attention.planning.programs import compile_step
from ring_attention.training.config import AttentionConfig, TrainConfig
from scripts.verify.each_pod import compile_for_each
from scripts.verify.published import LLAMA_7B

PODS = ("v4:2x2x4", "v4:2x4x4", "v4:4x4x4", "v4:4x4x8", "v4:4x8x8", "v4:8x8x8")
TOLERANCE = 0.05
WEIGHT_BYTES = 4 + 4 + 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled step; bytes are of one device.

    Attributes:
      pod: what it was compiled for.
      devices: of the ring.
      tokens: of the sequence.
      state: parameters, optimizer and batch.
      weights: gradients, updates and copies of the device's parameters.
      temporaries: all, those too.
      seconds: that compilation took.
    """

    pod: str
    devices: int
    tokens: int
    state: int
    weights: int
    temporaries: int
    seconds: float

    @property
    def activations(self) -> int:
        """The other temporaries."""
        return self.temporaries - self.weights


def compile_row(pod: str, shard: int) -> Row:
    """Compile the step for one pod."""
    devices, start = pod_devices(pod), time.monotonic()
    attention = AttentionConfig(layout="zigzag", impl="splash", block_q=256, block_kv=256)
    tokens = len(devices) * shard
    config = TrainConfig(name="7B", model=LLAMA_7B, attention=attention, seq_len=tokens, num_steps=10_000)
    memory = compile_step(config, devices).memory_analysis()
    return Row(
        pod=pod,
        devices=len(devices),
        tokens=tokens,
        state=memory.argument_size_in_bytes,
        weights=WEIGHT_BYTES * LLAMA_7B.num_parameters // len(devices),
        temporaries=memory.temp_size_in_bytes,
        seconds=round(time.monotonic() - start, 1),
    )


def table_of(rows: list[Row], shard: int) -> Table:
    """Return the rows for a reader."""
    table = Table(title=f"7B training step, {shard} tokens on each device, GiB of a device")
    for name in ("pod", "devices", "tokens", "state", "made of it", "activations", "of the first", "compile"):
        table.add_column(name, no_wrap=True, justify="left" if name == "pod" else "right")
    for row in rows:
        share = row.activations / rows[0].activations
        sizes = [f"{size / GiB:.2f}" for size in (row.state, row.weights, row.activations)]
        table.add_row(row.pod, str(row.devices), f"{row.tokens:,}", *sizes, f"{share:.1%}", f"{row.seconds:.0f} s")
    return table


def main(argv: list[str]) -> int:
    """Compile, write, print."""
    rows = compile_for_each(argv, __doc__, PODS, 4096, lambda *of: [compile_row(*of)], table_of)
    first = rows[0].activations
    off = [f"{row.devices} devices" for row in rows if abs(row.activations / first - 1) > TOLERANCE]
    print(f"more than {TOLERANCE:.0%} off the first: {', '.join(off)}" if off else f"the same within {TOLERANCE:.0%}")
    return int(bool(off))
