"""Whole training steps whose seconds are known, published or measured, and what the planner predicts for the same."""

import dataclasses
import json
from pathlib import Path

from ring_attention.hardware.reach import KernelRate
from ring_attention.hardware.topology import Topology, find_topology
from ring_attention.models.config import ModelConfig
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import StepTime, step_time
from ring_attention.training.config import AttentionConfig, MeshConfig, OptimizerConfig, TrainConfig

FILE = Path(__file__).with_suffix(".json")

OTHER_KERNELS = {
    "flash2": KernelRate(
        kernel="FlashAttention-2",
        chips=("h100",),
        forward=0.22,
        backward=0.19,
        source="fitted to the half of the rows that set constants",
    ),
    "triton_flash": KernelRate(
        kernel="FlashAttention in Triton",
        chips=("a100",),
        forward=0.4,
        backward=0.27,
        source="fitted to the half of the rows that set constants",
    ),
    "te_ring": KernelRate(
        kernel="TransformerEngine's ring",
        chips=("h100",),
        forward=0.43,
        backward=0.44,
        source="MagiAttention's charts: 421 and 432 of 989 TFLOP/s",
    ),
}
"""What rows ran where the planner would price cuDNN: FlashAttention-2 as it was on H100 in 2023 and 2024."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedStep:
    """One row of the file.

    Attributes:
      id: its name.
      source, page: who published it, and where.
      topology: as `find_topology` takes it.
      model: vocabulary, layers, width, heads, key/value heads, head dim, hidden width of SwiGLU (two thirds of it where
        the source has no gate), and whether embeddings are tied.
      seq_len, batch: tokens of a sequence, and sequences of a step.
      mesh: sizes of the mesh axes that are more than 1.
      strategy, ulysses_size, layout: of attention.
      remat: the nearest of `ModelConfig.remat`.
      accumulate: micro-batches.
      kernel: a name of OTHER_KERNELS, or "" for the kernel of the platform.
      dense: how many times as fast as planned its dense layers are: 1.6 in float8, of at most two, for the casts and
        what stays in bfloat16; 0.8 on torchtitan's H100s, which have 500 W of 700 (fitted to the half that sets
        constants).
      network: bytes a second of a GPU's network, where it is not the chip's usual one; 0 where it is.
      seconds: of a step, published or from published tokens a second.
      assumed: what the source leaves open.
    """

    id: str
    source: str
    page: str
    topology: str
    model: list
    seq_len: int
    batch: int
    mesh: dict[str, int]
    strategy: str
    layout: str
    remat: str
    seconds: float
    accumulate: int
    assumed: list[str]
    ulysses_size: int = 0
    kernel: str = ""
    dense: float = 1.0
    network: float = 0.0

    def pod(self) -> Topology:
        """The pod, with the rates of the row's own kernel, dtype and network."""
        pod = find_topology(self.topology)
        reach = dataclasses.replace(pod.reach, matmul=pod.reach.matmul * self.dense)
        chip = dataclasses.replace(pod.chip, network=self.network or pod.chip.network)
        return dataclasses.replace(pod, chip=chip, measured=reach, measured_kernel=OTHER_KERNELS.get(self.kernel))

    def share(self) -> Share:
        """A device's part of the step."""
        vocab, layers, width, heads, kv_heads, head_dim, ffn, tied = self.model
        model = ModelConfig(
            vocab_size=vocab,
            num_layers=layers,
            model_dim=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_dim=ffn,
            tied_embeddings=tied,
            compute_dtype="bfloat16",
            remat=self.remat,
        )
        config = TrainConfig(
            name=self.id,
            model=model,
            seq_len=self.seq_len,
            batch_size=self.batch,
            eval_sequences=self.batch,
            num_steps=1000,
            mesh=MeshConfig(**self.mesh),
            optimizer=OptimizerConfig(accumulation_steps=self.accumulate),
            attention=AttentionConfig(
                strategy=self.strategy, ulysses_size=self.ulysses_size, layout=self.layout, block_q=512, block_kv=512
            ),
        )
        mesh = dict.fromkeys(("dp", "fsdp", "sp", "tp"), 1) | self.mesh
        return Share(config=config, topology=self.pod(), mesh=mesh)

    def planned(self) -> StepTime:
        """What the planner predicts."""
        share = self.share()
        return step_time(share, share.strategy)


def all_steps() -> dict[str, list[PublishedStep]]:
    """The rows of the file: measured by us, published and used to set constants, published and held out.

    Published rows are taken in turns, in the order of their names: the first sets constants, the second is held out.
    """
    rows = sorted(json.loads(FILE.read_text(encoding="utf-8")), key=lambda row: row["id"])
    steps = [PublishedStep(**row) for row in rows]
    others = [step for step in steps if not step.id.startswith("own-")]
    own = [step for step in steps if step.id.startswith("own-")]
    return {"measured": own, "sets constants": others[::2], "held out": others[1::2]}
