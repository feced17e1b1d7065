"""How attention runs, and what it sees, as the section `attention` of a config."""

import dataclasses

from ring_attention.attention.blocks import CHOSEN, BlockSizes
from ring_attention.checks import ConfigError, require_field
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.parallel.dealt_rows import DocumentDealing
from ring_attention.parallel.layouts import LAYOUT_KINDS, SequenceLayout, as_layout, parse_speeds
from ring_attention.parallel.ring import Ring
from ring_attention.parallel.strategies import STRATEGIES, find_strategy
from ring_attention.parallel.strategy import Strategy

STRATEGY_OPTIONS = ("duplex", "unroll", "head_groups", "ulysses_size", "stride")
"""Fields of `AttentionConfig` that are options of one strategy or another; 0 leaves them out."""

AUTO, DOCUMENTS = "auto", "documents"
LAYOUTS = (AUTO, *LAYOUT_KINDS, DOCUMENTS)
"""What `AttentionConfig.layout` may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How attention runs over the devices that share a sequence.

    Attributes:
      strategy: how queries and keys of different devices meet, a name from `ring_attention.STRATEGIES`.
      duplex: "ring" and "sliding_window": send half of the keys and values each way round, for links that carry both
        directions at once.
      unroll: "ring" and "sliding_window": write the steps of the ring out instead of looping over them.
      head_groups: "all_gather": into how many parts key/value heads are gathered; 0: one head at a time.
      ulysses_size: "usp": devices that swap heads for tokens; 0: as many as divide the heads.
      stride: "sparse": how far apart the tokens are that see each other; 0: the power of two nearest to the root of
        seq_len.
      layout: order in which tokens are dealt to shards: "contiguous", "zigzag" or "striped"; "documents": chunks of
        each row by the documents in it, so that the work of devices is even and keys go no farther than that needs;
        "auto": that where documents are short beside rows, no layer has a window or chunk, and strategy and kernel
        can, else "zigzag". Where nothing is trained both are "zigzag".
      speeds: how fast each device along the ring is, numbers with spaces between; tokens are dealt so that the work
        of each is proportional to its speed, chunks of documents too, and other layouts are not used. Empty: all are
        alike.
      local_strategy: the strategy of layers with a window or chunk of their own (`model.layers`), whose tokens others
        would send farther than anybody sees: a name, without options. Empty: "ring", which goes as far as the window
        or chunk reaches.
      window: a token sees itself and the window-1 tokens before it; 0: all before it.
      chunk: a token sees those before it in its own chunk of so many tokens of the sequence; 0: of any.
      max_segment_len: documents have at most so many tokens, so that keys travel no farther; 0: nobody says. A token of
        a longer one does not see those so far before it.
      softcap: attention scores x become softcap * tanh(x / softcap); 0 leaves them.
      sinks: each head has a learned logit that takes part in its softmax and has no value, a parameter.
      alibi: scores fall with distance, by a slope for each head (Press et al. 2022); with model.rope.fraction=0 they
        are the only positions.
      dropout_rate: the share of attention weights that is dropped in training; which they are follows from `seed`, the
        step, the layer and where they stand, on any mesh.
      impl: the kernel that computes tiles, "auto" or a name.
      block_q: query tokens of a tile; -1: chosen for the kernel and the device.
      block_kv: key tokens of a tile; -1: chosen.
      block_heads: key/value heads of a tile; -1: chosen.
    """

    strategy: str = "ring"
    duplex: bool = False
    unroll: bool = False
    head_groups: int = 0
    ulysses_size: int = 0
    stride: int = 0
    layout: str = AUTO
    speeds: str = ""
    local_strategy: str = ""
    window: int = 0
    chunk: int = 0
    max_segment_len: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    dropout_rate: float = 0.0
    impl: str = "auto"
    block_q: int = CHOSEN
    block_kv: int = CHOSEN
    block_heads: int = CHOSEN

    def __post_init__(self):
        require_field(
            self.layout in LAYOUTS,
            "attention.layout",
            self.layout,
            "is not known",
            f"choose one of {', '.join(LAYOUTS)}",
        )
        for name in ("window", "chunk", "max_segment_len", "softcap", *STRATEGY_OPTIONS):
            value = getattr(self, name)
            require_field(value >= 0, f"attention.{name}", value, "must not be negative", "0 leaves it out")
        for name in ("strategy", "local_strategy"):
            value = getattr(self, name)
            known = f"choose one of {', '.join(STRATEGIES)}"
            require_field(
                value in STRATEGIES or name == "local_strategy" and not value,
                f"attention.{name}",
                value,
                "is not known",
                known,
            )
        rate = self.dropout_rate
        fits = rate >= 0 and round(rate * 2**32) < 2**32  # counted in 32 bits
        need, remedy = "must lie in [0, 1)", "0 leaves dropout out"
        require_field(fits, "attention.dropout_rate", rate, need, remedy)
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

    def make_local_strategy(self) -> Strategy:
        """Return the strategy of layers with a window or chunk of their own."""
        if self.local_strategy:
            return find_strategy(self.local_strategy)
        return Ring(duplex=self.duplex, unroll=self.unroll)

    def completed(self, model: ModelConfig) -> ModelConfig:
        """Return the model with what this section says of the attention of its layers."""
        of_all = LayerKind(
            window=self.window, chunk=self.chunk, rope=model.rope, sinks=self.sinks, softcap=self.softcap
        )
        return dataclasses.replace(model, layers=tuple(kind.completed(of_all) for kind in model.kinds))

    @property
    def block_sizes(self) -> BlockSizes:
        """The tiles, with what is to be chosen left open."""
        return BlockSizes(q=self.block_q, kv=self.block_kv, cut=CHOSEN, heads=self.block_heads)

    @property
    def in_words(self) -> str:
        """Strategy and layout in a few words."""
        layout = f"{self.static_layout} layout"
        if self.layout == DOCUMENTS:
            layout = "each row dealt by its documents" + (f" for speeds {self.speeds}" if self.speeds else "")
        elif self.speeds:
            layout = f"tokens dealt for speeds {self.speeds}"
        return f"attention by {self.strategy}, {layout}"

    @property
    def static_layout(self) -> str:
        """The layout where documents do not tell it: in evaluation, generation and plans."""
        return "zigzag" if self.layout in (AUTO, DOCUMENTS) else self.layout

    def make_layout(self, ring_size: int) -> SequenceLayout:
        """Return the layout of a sequence over `ring_size` devices where documents do not tell it."""
        if not self.speeds:
            return SequenceLayout(self.static_layout, ring_size)
        layout = SequenceLayout.for_speeds(parse_speeds(self.speeds))
        return as_layout(layout, ring_size)

    def make_dealing(self, ring_size: int) -> SequenceLayout | DocumentDealing:
        """Return how batches are dealt in training."""
        if self.layout != DOCUMENTS:
            return self.make_layout(ring_size)
        return DocumentDealing(ring_size=ring_size, speeds=tuple(parse_speeds(self.speeds)) if self.speeds else ())
