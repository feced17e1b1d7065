"""Everything that decides a run, in one frozen object, `TrainConfig`."""

import dataclasses
import functools

from ring_attention.checks import require_field, require_local
from ring_attention.data.config import DataConfig
from ring_attention.models.config import ModelConfig
from ring_attention.training.attention_config import AttentionConfig

OFFLOADS = ("none", "moments", "parameters")
"""What `OptimizerConfig.offload` may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 in at most one place takes what is left.

    Attributes:
      dp: data parallel, parameters replicated.
      fsdp: data parallel, parameters sharded.
      sp: the ring: the sequence (and the parameters) sharded.
      tp: heads, feed-forward and vocabulary sharded.
    """

    dp: int = 1
    fsdp: int = 1
    sp: int = -1
    tp: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require_field(
                size > 0 or size == -1, f"mesh.{name}", size, "must be positive or -1", "use 1 to leave it out"
            )
        free = [name for name, size in sizes.items() if size == -1]
        require_field(
            len(free) < 2,
            f"mesh.{free[-1] if free else None}",
            -1,
            f"only one axis may be -1, got {free}",
            "give the others a size",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay.

    Attributes:
      learning_rate: at the end of the warm-up.
      warmup_steps: updates of the linear warm-up from 0.
      final_fraction: the share of `learning_rate` that the last step has.
      b1: how much of AdamW's mean of gradients stays at a step.
      b2: how much of AdamW's mean of their squares stays at a step.
      epsilon: added to the root of that mean, by which AdamW divides.
      weight_decay: on matrices; norms, biases and sinks are not decayed.
      clip_norm: global gradient norm above which gradients are scaled down.
      accumulation_steps: micro-batches whose gradients make one update.
      max_skipped_updates: a step whose loss or gradient is not finite leaves the parameters as they are; so many of
        them in a row end the run.
      offload: what of the layers lives in the memory of the host. "moments": AdamW's two moments, 8 bytes a parameter
        that cross to the device and back once a step. "parameters": moments, float32 parameters and gradients, so that
        a device holds of all layers the weights of the one at work; a layer's weights cross to the device for each of
        its passes, its gradients to the host as they are made, and all of it once more for the update. Embedding and
        unembedding stay on the device, with their moments. Losses and parameters are those without it, but for the
        last digit of the gradients' norm. "none" keeps everything on the device.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulation_steps: int = 1
    max_skipped_updates: int = 10
    offload: str = "none"

    def __post_init__(self):
        known = f"choose one of {', '.join(OFFLOADS)}"
        require_field(self.offload in OFFLOADS, "optimizer.offload", self.offload, "is not known", known)
        for name in ("learning_rate", "clip_norm", "accumulation_steps", "max_skipped_updates", "epsilon"):
            value = getattr(self, name)
            require_field(value > 0, f"optimizer.{name}", value, "must be positive", "leave it out to take the default")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require_field(value >= 0, f"optimizer.{name}", value, "must not be negative", "use 0 to switch it off")
        for name in ("b1", "b2", "final_fraction"):
            value = getattr(self, name)
            require_field(
                0 <= value < 1, f"optimizer.{name}", value, "must lie in [0, 1)", "leave it out to take the default"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of train.py.

    Attributes:
      name: what the run is called.
      seq_len: T, tokens of a sequence, over all devices of the ring.
      batch_size: sequences of a step, over all devices and micro-batches.
      num_steps: updates.
      seed: decides the initial parameters.
      init_from: begin with the parameters of a trained model rather than random ones: the folder of a run, of an import
        (scripts/import_hf.py) or of a Hugging Face checkpoint. What the config leaves at its default of the model, and
        of attention's window and softcap, is that model's; a config file that says something else is refused. The
        command line may change the section rope, the window and how the model is computed. A run that has a checkpoint
        goes on from that.
      log_every: steps between lines of metrics.
      eval_every: steps between held-out losses.
      checkpoint_every: steps between checkpoints.
      eval_sequences: held-out sequences that the loss is measured on.
      run_dir: folder for the run's checkpoints, metrics and config; empty: `runs/<name>`.
    """

    name: str
    model: ModelConfig
    seq_len: int
    num_steps: int
    batch_size: int = 1
    mesh: MeshConfig = MeshConfig()
    attention: AttentionConfig = AttentionConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    init_from: str = ""
    log_every: int = 10
    eval_every: int = 100
    eval_sequences: int = 8
    checkpoint_every: int = 200
    run_dir: str = ""

    def __post_init__(self):
        for name in [
            "seq_len",
            "num_steps",
            "batch_size",
            "log_every",
            "eval_every",
            "eval_sequences",
            "checkpoint_every",
        ]:
            value = getattr(self, name)
            require_field(value > 0, name, value, "must be positive", "give at least 1")
        require_field(0 <= self.seed < 2**32, "seed", self.seed, "must lie in [0, 2**32)", "choose another")
        for name in ("name", "run_dir"):
            value = getattr(self, name)
            fit = value.isprintable() and (value or name == "run_dir")
            require_field(
                bool(fit), name, value, "must be the name of a folder", "write it in letters that can be printed"
            )
        for name in ("name", "run_dir", "init_from"):
            require_local(name, getattr(self, name))
        accumulation = self.optimizer.accumulation_steps
        require_field(
            self.batch_size % accumulation == 0,
            "batch_size",
            self.batch_size,
            f"is not divisible by optimizer.accumulation_steps={accumulation}",
            f"use batch_size={-(-self.batch_size // accumulation) * accumulation}",
        )
        require_field(
            self.eval_sequences % self.micro_batch_size == 0,
            "eval_sequences",
            self.eval_sequences,
            f"is not divisible by the {self.micro_batch_size} sequences that run at once",
            f"use eval_sequences={-(-self.eval_sequences // self.micro_batch_size) * self.micro_batch_size}",
        )
        require_field(
            self.optimizer.warmup_steps < self.num_steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"must be less than num_steps={self.num_steps}",
            "shorten the warm-up or train for longer",
        )

    @functools.cached_property
    def transformer(self) -> ModelConfig:
        """The model with what the section attention says of its layers: of it the parameters are."""
        return self.attention.completed(self.model)

    @property
    def micro_batch_size(self) -> int:
        """Number of sequences that run at once, over all devices."""
        return self.batch_size // self.optimizer.accumulation_steps
