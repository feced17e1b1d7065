"""Shape and numerics of the Transformer."""

import dataclasses

from ring_attention.checks import require_field
from ring_attention.models.rope import RopeConfig

REMAT_POLICIES = ("none", "attention", "full", "offload", "offload_input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, rotary positions, grouped queries, SwiGLU.

    Attributes:
      vocab_size: V, rows of the embedding table; at least the tokenizer's own size.
      num_layers: L.
      model_dim: M.
      num_heads: H, query heads.
      num_kv_heads: K, key/value heads; divides H.
      head_dim: D; even, because rotary embedding turns pairs.
      ffn_dim: F, hidden width of SwiGLU.
      rope: frequencies of the rotary embedding, and how they are stretched to a longer window.
      norm_epsilon: added to the mean square in RMSNorm.
      tied_embeddings: the unembedding is the embedding, transposed.
      qkv_bias: queries, keys and values have biases (Qwen2).
      qk_norm: queries and keys are normalised, each head by itself, before they are turned (Qwen3).
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
    ffn_dim: int
    rope: RopeConfig = RopeConfig()
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
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
        require_field(
            self.norm_epsilon > 0,
            "model.norm_epsilon",
            self.norm_epsilon,
            "must be positive",
            "leave it out to take the default",
        )
        require_field(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"must divide model.num_heads={self.num_heads}",
            "set both so that each key/value head serves the same number of query heads",
        )
        require_field(
            self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "must be even (rotary pairs)", "use 32, 64 or 128"
        )
        require_field(
            self.compute_dtype in ("float32", "bfloat16"),
            "model.compute_dtype",
            self.compute_dtype,
            "is not known",
            "choose float32 or bfloat16",
        )
        require_field(
            self.remat in REMAT_POLICIES,
            "model.remat",
            self.remat,
            "is not known",
            f"choose one of {', '.join(REMAT_POLICIES)}",
        )

    @property
    def num_parameters(self) -> int:
        """Number of scalar parameters."""
        attention = 2 * self.model_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        biases = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        norms = 2 * self.model_dim + (2 * self.head_dim if self.qk_norm else 0)
        layer = attention + biases + 3 * self.model_dim * self.ffn_dim + norms
        return self.num_layers * layer + self.vocab_tables * self.vocab_size * self.model_dim + self.model_dim

    @property
    def vocab_tables(self) -> int:
        """Matrices [V,M] or [M,V]: embedding and unembedding, or one for both."""
        return 1 if self.tied_embeddings else 2

    def training_flops(self, tokens: int, visible_pairs: int) -> float:
        """Floating-point operations of a training step: 6 per weight and token, plus attention's own.

        Attention counts its two products forward, 4*H*D operations for each (query, key) pair that the mask shows, and
        twice that backward, as weights do. What is computed again is not counted, neither what rematerialisation
        repeats nor the scores of attention's backward pass (model FLOPs, PaLM paper, appendix B).
        """
        looked_up = (self.vocab_tables - 1) * self.vocab_size * self.model_dim  # rather than multiplied
        matrices = self.num_parameters - looked_up
        attention = 4 * self.num_heads * self.head_dim * self.num_layers
        return 6.0 * matrices * tokens + 3.0 * attention * visible_pairs
