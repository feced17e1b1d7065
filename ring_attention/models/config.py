"""Shape and numerics of the Transformer."""

import dataclasses
import functools

from ring_attention.checks import require_field
from ring_attention.models.layer_kinds import LayerKind, LayerLoop
from ring_attention.models.rope import RopeConfig

REMAT_POLICIES = ("none", "attention", "full", "offload", "offload_input")
NORM_KINDS = ("rms", "layer")
NORM_PLACES = ("before", "after", "both", "parallel")
ACTIVATIONS = ("silu", "gelu_tanh", "clamped_silu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer with rotary positions, grouped queries and a gated feed-forward.

    The defaults are those of Llama: RMSNorm before attention and feed-forward, SwiGLU, no biases, layers all alike.

    Attributes:
      vocab_size: V, rows of the embedding table; at least the tokenizer's own size.
      num_layers: L.
      model_dim: M.
      num_heads: H, query heads.
      num_kv_heads: K, key/value heads; divides H.
      head_dim: D, of queries and keys.
      value_head_dim: of values; 0: D. Attention pads the shorter of the two with zeros.
      ffn_dim: F, hidden width of the feed-forward.
      layers: kinds of layers, a period that is repeated to num_layers; what does not fill a period stands at the end.
        Empty: all layers are alike. On a command line as JSON, '[{"window": 1024}, {}]'.
      rope: frequencies of the rotary embedding, and how they are stretched to a longer window.
      attention_scale: what scores are multiplied by; 0: D**-0.5.
      norm: "rms", root mean square; "layer", which also takes the mean away (both without a bias).
      norm_place: where norms stand. "before" attention and feed-forward; "after" each, on what it adds (OLMo 2); "both"
        (Gemma 2); "parallel": one norm, of which attention and feed-forward both work, side by side (Cohere).
      norm_zero_centered: norms multiply by 1 + weight (Gemma).
      norm_epsilon: added to the mean square in norms.
      activation: of the feed-forward's gate: "silu", "gelu_tanh", or "clamped_silu", gpt-oss's: gate and up are cut off
        at 7, and silu(1.702 gate) / 1.702 multiplies up + 1.
      embedding_scale: what embeddings are multiplied by (Gemma: the root of M).
      residual_scale: what each attention and feed-forward is multiplied by as it is added (Granite).
      logit_scale: what logits are multiplied by.
      logit_softcap: logits x then become logit_softcap * tanh(x / logit_softcap); 0 leaves them (Gemma 2).
      tied_embeddings: the unembedding is the embedding, transposed.
      qkv_bias: queries, keys and values have biases (Qwen2).
      out_bias: attention's output product has a bias.
      ffn_bias: the three products of the feed-forward have biases.
      qk_norm: queries and keys are normalised before they are turned, each head by itself (Qwen3).
      qk_norm_across: that norm is over all heads together (OLMo 2); not with head_groups.
      compute_dtype: dtype of activations and matrix products, "float32" or "bfloat16". Parameters are float32.
      remat: what a layer keeps for its backward pass. "attention" keeps the layer's input and attention's out and lse,
        so that no ring runs twice (only ring self-attention does); "full" keeps the input alone; "none" keeps
        everything but what stands between the feed-forward's products. "offload" keeps what "attention" does, and
        "offload_input" what "full" does, in the memory of the host (lse stays, 4 bytes of each head), so that a device
        holds the activations of one layer however many there are. Each token and layer then costs the host H * D + M
        numbers, or M, in the compute dtype, which cross to the host and back.
      head_groups: parts of a device's heads whose attention is computed one after the other, each in a ring of its own,
        so that queries, keys, values and their gradients exist for one part at a time. The gradient of attention's
        input is then summed over the parts in the compute dtype. Not with "offload" on TPU.
      ffn_chunk: tokens per device that the feed-forward works on at once.
      loss_chunk: tokens per device whose logits exist at once.
      start_local: begin with attention to nearby tokens, by equal query and key weights and a direction that all
        embeddings share, whose rotary similarity falls with distance. Without it attention begins even over the whole
        context, and a small model takes long to find that neighbours matter (docs/experiments.md).
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int = 0
    ffn_dim: int
    layers: tuple[LayerKind, ...] = ()
    rope: RopeConfig = RopeConfig()
    attention_scale: float = 0.0
    norm: str = "rms"
    norm_place: str = "before"
    norm_zero_centered: bool = False
    norm_epsilon: float = 1e-5
    activation: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    qk_norm_across: bool = False
    compute_dtype: str = "float32"
    remat: str = "attention"
    head_groups: int = 1
    ffn_chunk: int = 1024
    loss_chunk: int = 1024
    start_local: bool = False

    def __post_init__(self):
        sizes = (
            "vocab_size num_layers model_dim num_heads num_kv_heads head_dim ffn_dim head_groups ffn_chunk loss_chunk"
        )
        for name in sizes.split():
            value = getattr(self, name)
            require_field(value > 0, f"model.{name}", value, "must be positive", "give at least 1")
        for name in ("norm_epsilon", "embedding_scale", "residual_scale", "logit_scale"):
            value = getattr(self, name)
            require_field(value > 0, f"model.{name}", value, "must be positive", "leave it out to take the default")
        for name in ("value_head_dim", "attention_scale", "logit_softcap"):
            value = getattr(self, name)
            require_field(value >= 0, f"model.{name}", value, "must not be negative", "0 leaves it out")
        require_field(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"must divide model.num_heads={self.num_heads}",
            "set both so that each key/value head serves the same number of query heads",
        )
        known = dict(
            compute_dtype=("float32", "bfloat16"),
            remat=REMAT_POLICIES,
            norm=NORM_KINDS,
            norm_place=NORM_PLACES,
            activation=ACTIVATIONS,
        )
        for name, choices in known.items():
            value = getattr(self, name)
            require_field(value in choices, f"model.{name}", value, "is not known", f"choose {' or '.join(choices)}")
        for rope in {self.rope, *self.ropes}:
            rope.check(self.head_dim)
        require_field(
            not self.qk_norm_across or self.qk_norm and self.head_groups == 1,
            "model.qk_norm_across",
            self.qk_norm_across,
            "needs model.qk_norm and model.head_groups=1",
            "leave it out to normalise each head by itself",
        )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of a period."""
        return self.layers or (LayerKind(),)

    @functools.cached_property
    def loop(self) -> LayerLoop:
        """How the layers are gone through."""
        return LayerLoop.of(self.kinds, self.num_layers)

    @property
    def ropes(self) -> set[RopeConfig]:
        """The rotary embeddings that layers have."""
        return {run.kind.rope or self.rope for run in self.loop.runs}

    def scaled_length(self, tokens: int) -> int:
        """The smallest length with which each layer's rotary frequencies are those of a sequence of so many tokens.

        A program that is made for a length, such as one that reads documents, serves all that have the same.
        """
        return max(rope.scaled_length(tokens) for rope in self.ropes)

    @property
    def value_dim(self) -> int:
        """The width of a head's values."""
        return self.value_head_dim or self.head_dim

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def num_parameters(self) -> int:
        """Number of scalar parameters."""
        M, H, K, D = self.model_dim, self.num_heads, self.num_kv_heads, self.head_dim
        layer = M * (D * (H + K) + self.value_dim * (H + K)) + 3 * M * self.ffn_dim
        layer += {"both": 4, "parallel": 1}.get(self.norm_place, 2) * M
        layer += (D * (H + K) + self.value_dim * K) * self.qkv_bias + M * self.out_bias
        layer += (2 * self.ffn_dim + M) * self.ffn_bias
        layer += (D * (H + K) if self.qk_norm_across else 2 * D) * self.qk_norm
        sinks = sum(H * run.count for run in self.loop.runs if run.kind.sinks)
        return self.num_layers * layer + sinks + self.vocab_tables * self.vocab_size * M + M

    @property
    def vocab_tables(self) -> int:
        """Matrices [V,M] or [M,V]: embedding and unembedding, or one for both."""
        return 1 if self.tied_embeddings else 2

    def visible_pairs(self, lengths) -> int:
        """How many (query, key) pairs the attention of all layers together sees in documents of these lengths."""
        return sum(run.kind.visible_pairs(lengths) * run.count for run in self.loop.runs)

    def training_flops(self, tokens: int, visible_pairs: int) -> float:
        """Floating-point operations of a training step: 6 per weight and token, plus attention's own.

        Attention counts its two products forward, 2*H*D and 2*H times the values' width for each (query, key) pair that
        a layer's mask shows, of all layers together, and twice that backward, as weights do. What is computed again is
        not counted, neither what rematerialisation repeats nor the scores of attention's backward pass (model FLOPs,
        PaLM paper, appendix B).
        """
        looked_up = (self.vocab_tables - 1) * self.vocab_size * self.model_dim  # rather than multiplied
        matrices = self.num_parameters - looked_up
        attention = 2 * self.num_heads * (self.head_dim + self.value_dim)
        return 6.0 * matrices * tokens + 3.0 * attention * visible_pairs
