"""The families of Hugging Face checkpoints that are imported and exported: a row of facts each."""

from ring_attention.models.hf.family import (
    ATTENTION_BIAS,
    EPSILON,
    MLP_BIAS,
    ROOT_OF_WIDTH,
    TIED,
    Family,
    Wrapper,
    activation,
    cap,
    root_divisor,
)
from ring_attention.models.hf.keys import Fixed
from ring_attention.models.hf.layer_types import LayerTypes

_LAYER = "{body}layers.{number}."  # of `names`
_STANDARD = (activation(), EPSILON, TIED)
_QWEN = dict(num_key_value_heads=32, max_position_embeddings=32_768, sliding_window=4096, max_window_layers=28)
_QWEN_LAYERS = LayerTypes(window=True, switch="use_sliding_window", listed=True, first="max_window_layers")
_GEMMA_NAMES = {"layers.feedforward_norm.scale": (_LAYER + "pre_feedforward_layernorm.weight", "M -> M")}
_GEMMA_MODEL = dict(norm_place="both", norm_zero_centered=True)
_GEMMA_KEYS = (
    activation("hidden_activation"),
    EPSILON,
    TIED,
    ROOT_OF_WIDTH,
    ATTENTION_BIAS,
    root_divisor("query_pre_attn_scalar", "attention_scale"),
    cap("final_logit_softcapping", "logit_softcap"),
)
_GEMMA = dict(
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    vocab_size=256_000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
)
_OLMO = dict(max_position_embeddings=2048, rms_norm_eps=1e-5)
_OLMO_NAMES = {
    "layers.attention.query_norm.scale": (_LAYER + "self_attn.q_norm.weight", "(H D) -> H D"),
    "layers.attention.key_norm.scale": (_LAYER + "self_attn.k_norm.weight", "(K D) -> K D"),
}
_OLMO_MODEL = dict(norm_place="after", qk_norm=True, qk_norm_across=True)

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=(*_STANDARD, ATTENTION_BIAS, MLP_BIAS),
        defaults=dict(max_position_embeddings=2048),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=dict(num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096),
        layers=LayerTypes(window=True),
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", model=dict(qkv_bias=True), defaults=_QWEN, layers=_QWEN_LAYERS),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        model=dict(qk_norm=True),
        keys=(*_STANDARD, ATTENTION_BIAS),
        defaults=_QWEN | dict(head_dim=128),
        layers=_QWEN_LAYERS,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        model=_GEMMA_MODEL,
        keys=(*_GEMMA_KEYS, cap("attn_logit_softcapping", "attention.softcap")),
        defaults=_GEMMA | dict(max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        layers=LayerTypes(window=True, listed=True, period=2),
        names=_GEMMA_NAMES,
        unread=("hidden_act", "sliding_window_size"),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        model=_GEMMA_MODEL | dict(qk_norm=True),
        keys=_GEMMA_KEYS,
        defaults=_GEMMA
        | dict(
            vocab_size=262_208,
            max_position_embeddings=131_072,
            sliding_window_pattern=6,
        ),
        layers=LayerTypes(
            window=True,
            listed=True,
            period=6,
            period_key="sliding_window_pattern",
            rope_by_type=True,
            thetas=(1e6, 1e4),
            local_theta="rope_local_base_freq",
        ),
        names=_GEMMA_NAMES,
        fixed={"attn_logit_softcapping": Fixed((None,), "no version of transformers caps the scores of Gemma 3")},
        unread=("hidden_act", "_sliding_window_pattern"),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        model=_OLMO_MODEL,
        keys=(*_STANDARD, ATTENTION_BIAS),
        defaults=_OLMO,
        names=_OLMO_NAMES,
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        model=_OLMO_MODEL,
        keys=(*_STANDARD, ATTENTION_BIAS),
        defaults=_OLMO | dict(sliding_window=4096),
        layers=LayerTypes(window=True, listed=True, period=4, rope_by_type=True, thetas=(5e5, 5e5)),
        names=_OLMO_NAMES,
    ),
}
"""Model type -> Family. A model that was trained here is written as the first that can say it."""

WRAPPERS = {
    "gemma3": Wrapper(
        architecture="Gemma3ForConditionalGeneration",
        texts=("gemma3_text",),
        keys=(
            *("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"),
            *("boi_token_id", "eoi_token_id", "image_token_id"),
        ),
        tensors=("vision_tower.", "multi_modal_projector."),
    ),
}
"""Model type -> Wrapper, of multimodal folders."""
