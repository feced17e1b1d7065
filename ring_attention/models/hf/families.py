"""The families of Hugging Face checkpoints that are imported and exported: a row of facts each."""

import dataclasses

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
    divisor,
    root_divisor,
    scale,
    score_scale,
)
from ring_attention.models.hf.keys import Fixed
from ring_attention.models.hf.layer_types import LayerTypes
from ring_attention.models.hf.rope import RopeFacts

_LAYER = "{body}layers.{number}."  # of `names`
_STANDARD = (activation(), EPSILON, TIED)
_MISTRAL = dict(num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096)
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
_QKV, _GATE_UP = _LAYER + "self_attn.qkv_proj.weight", _LAYER + "mlp.gate_up_proj.weight"
_PHI_NAMES = {
    "layers.attention.query": (_QKV, "(H D) M -> M H D"),
    "layers.attention.key": (_QKV, "(K D) M -> M K D"),
    "layers.attention.value": (_QKV, "(K D) M -> M K D"),
    "layers.feedforward.gate": (_GATE_UP, "F M -> M F"),
    "layers.feedforward.up": (_GATE_UP, "F M -> M F"),
}
_PHI_FIXED = {
    key: Fixed(allowed, "transformers does not read it, and computes without it")
    for key, allowed in dict(full_attn_mod=(None, 1), interpolate_factor=(None, 1), lm_head_bias=(None, False)).items()
}
_COHERE_NAMES = {  # pairs lie side by side in the files, and as the two halves of a head here
    "layers.attention.query": (_LAYER + "self_attn.q_proj.weight", "(H d p) M -> M H (p d)"),
    "layers.attention.key": (_LAYER + "self_attn.k_proj.weight", "(K d p) M -> M K (p d)"),
    "layers.attention.query_bias": (_LAYER + "self_attn.q_proj.bias", "(H d p) -> H (p d)"),
    "layers.attention.key_bias": (_LAYER + "self_attn.k_proj.bias", "(K d p) -> K (p d)"),
}
_COHERE_FIXED = {
    key: Fixed((None, value), "transformers does not read it, and computes without it")
    for key, value in dict(
        order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj",
        rotary_pct=1,
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=False,
    ).items()
}

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=(*_STANDARD, ATTENTION_BIAS, MLP_BIAS),
        defaults=dict(max_position_embeddings=2048),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=_MISTRAL,
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
    "ministral": Family(
        architecture="MinistralForCausalLM", defaults=_MISTRAL, layers=LayerTypes(window=True, listed=True)
    ),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        defaults=dict(
            num_key_value_heads=8, head_dim=128, max_position_embeddings=262_144, rms_norm_eps=1e-5, vocab_size=131_072
        ),
        layers=LayerTypes(window=True),
        rope=RopeFacts(scalings=("yarn",), query_growth=True),
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        keys=(*_STANDARD, ATTENTION_BIAS, MLP_BIAS),
        defaults=dict(num_key_value_heads=4, max_position_embeddings=32_768, tie_word_embeddings=True),
        layers=LayerTypes(
            window=True,
            switch="use_sliding_window",
            listed=True,
            thetas=(2e6, 2e6),
            positions="no_rope_layers",
            positions_period="no_rope_layer_interval",
        ),
        unread=("pretraining_tp",),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults=dict(max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5),
        layers=LayerTypes(window=True),
        rope=RopeFacts(scalings=("default", "longrope"), partial=True),
        names=_PHI_NAMES,
        fixed=_PHI_FIXED,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        keys=(
            *_STANDARD,
            ATTENTION_BIAS,
            MLP_BIAS,
            scale("embedding_multiplier", "embedding_scale"),
            scale("residual_multiplier", "residual_scale"),
            divisor("logits_scaling", "logit_scale"),
            score_scale("attention_multiplier"),
        ),
        defaults=dict(max_position_embeddings=2048),
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        model=dict(norm="layer", norm_place="parallel"),
        keys=(
            activation(),
            dataclasses.replace(EPSILON, name="layer_norm_eps"),
            TIED,
            ATTENTION_BIAS,
            scale("logit_scale", "logit_scale"),
        ),
        defaults=dict(
            max_position_embeddings=8192,
            layer_norm_eps=1e-5,
            tie_word_embeddings=True,
            logit_scale=0.0625,
            sliding_window=4096,
        ),
        layers=LayerTypes(
            window=True, listed=True, period=4, period_key="sliding_window_pattern", full_without_positions=True
        ),
        names=_COHERE_NAMES,
        fixed=_COHERE_FIXED,
        unread=("_sliding_window_pattern", "layer_switch"),
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
        fixed={"final_logit_softcapping": Fixed((None,), "no version of transformers caps the logits of this class")},
        tensors=("vision_tower.", "multi_modal_projector."),
    ),
    "mistral3": Wrapper(
        architecture="Mistral3ForConditionalGeneration",
        texts=("mistral", "ministral3"),
        keys=(
            *("vision_config", "image_token_index", "image_token_id", "multimodal_projector_bias"),
            *("projector_hidden_act", "spatial_merge_size", "vision_feature_layer"),
        ),
        tensors=("vision_tower.", "multi_modal_projector."),
    ),
}
"""Model type -> Wrapper, of multimodal folders."""
