"""Everything that decides a run, in one frozen object, `TrainConfig`."""

import dataclasses

from ring_attention.attention.blocks import CHOSEN, BlockSizes
from ring_attention.checks import ConfigError, require_field, require_local
from ring_attention.data.config import DataConfig
from ring_attention.models.config import ModelConfig
from ring_attention.parallel.layouts import LAYOUT_KINDS, SequenceLayout, as_layout, parse_speeds
from ring_attention.parallel.strategies import STRATEGIES, find_strategy
from ring_attention.parallel.strategy import Strategy

STRATEGY_OPTIONS = ("duplex", "head_groups", "ulysses_size", "stride")
"""Fields of `AttentionConfig` that are options of one strategy or another; 0 leaves them out."""

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
class AttentionConfig:
    """How attention runs over the devices that share a sequence.

    Attributes:
      strategy: how queries and keys of different devices meet, a name from `ring_attention.STRATEGIES`.
      duplex: "ring" and "sliding_window": send half of the keys and values each way round, for links that carry both
        directions at once.
      head_groups: "all_gather": into how many parts key/value heads are gathered; 0: one head at a time.
      ulysses_size: "usp": devices that swap heads for tokens; 0: as many as divide the heads.
      stride: "sparse": how far apart the tokens are that see each other; 0: the power of two nearest to the root of
        seq_len.
      layout: order in which tokens are dealt to shards: "contiguous", "zigzag" or "striped".
      speeds: how fast each device along the ring is, numbers with spaces between; tokens are dealt so that the work
        of each is proportional to its speed, and `layout` is not used. Empty: all are alike.
      window: a token sees itself and the window-1 tokens before it; 0: all before it.
      softcap: attention scores x become softcap * tanh(x / softcap); 0 leaves them.
      impl: the kernel that computes tiles, "auto" or a name.
      block_q: query tokens of a tile; -1: chosen for the kernel and the device.
      block_kv: key tokens of a tile; -1: chosen.
      block_heads: key/value heads of a tile; -1: chosen.
    """

    strategy: str = "ring"
    duplex: bool = False
    head_groups: int = 0
    ulysses_size: int = 0
    stride: int = 0
    layout: str = "zigzag"
    speeds: str = ""
    window: int = 0
    softcap: float = 0.0
    impl: str = "auto"
    block_q: int = CHOSEN
    block_kv: int = CHOSEN
    block_heads: int = CHOSEN

    def __post_init__(self):
        require_field(
            self.layout in LAYOUT_KINDS,
            "attention.layout",
            self.layout,
            "is not known",
            f"choose one of {', '.join(LAYOUT_KINDS)}",
        )
        for name in ("window", "softcap", *STRATEGY_OPTIONS):
            value = getattr(self, name)
            require_field(value >= 0, f"attention.{name}", value, "must not be negative", "0 leaves it out")
        require_field(
            self.strategy in STRATEGIES,
            "attention.strategy",
            self.strategy,
            "is not known",
            f"choose one of {', '.join(STRATEGIES)}",
        )
        known = {field.name for field in dataclasses.fields(STRATEGIES[self.strategy]) if field.init}
        for name in STRATEGY_OPTIONS:
            value = getattr(self, name)
            require_field(
                not value or name in known,
                f"attention.{name}",
                value,
                f"is no option of attention.strategy={self.strategy!r}",
                f"leave it out; that one takes {', '.join(sorted(known & set(STRATEGY_OPTIONS))) or 'no options'}",
            )
        if self.speeds:
            try:
                parse_speeds(self.speeds)
            except ValueError as error:
                raise ConfigError(f"attention.{error}") from error
        for name in ("block_q", "block_kv", "block_heads"):
            value = getattr(self, name)
            need, remedy = "must be positive, or -1", "leave it out to have it chosen"
            require_field(value > 0 or value == CHOSEN, f"attention.{name}", value, need, remedy)

    def make_strategy(self) -> Strategy:
        """Return the strategy with its options."""
        options = {name: getattr(self, name) for name in STRATEGY_OPTIONS if getattr(self, name)}
        return find_strategy(self.strategy, options)

    @property
    def block_sizes(self) -> BlockSizes:
        """The tiles, with what is to be chosen left open."""
        return BlockSizes(q=self.block_q, kv=self.block_kv, heads=self.block_heads)

    @property
    def in_words(self) -> str:
        """Strategy and layout in a few words."""
        layout = f"tokens dealt for speeds {self.speeds}" if self.speeds else f"{self.layout} layout"
        return f"attention by {self.strategy}, {layout}"

    def make_layout(self, ring_size: int) -> SequenceLayout:
        """Return the layout of a sequence over `ring_size` devices."""
        if not self.speeds:
            return SequenceLayout(self.layout, ring_size)
        layout = SequenceLayout.for_speeds(parse_speeds(self.speeds))
        return as_layout(layout, ring_size)


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
      weight_decay: on matrices; norms and biases are not decayed.
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

    @property
    def micro_batch_size(self) -> int:
        """Number of sequences that run at once, over all devices."""
        return self.batch_size // self.optimizer.accumulation_steps
