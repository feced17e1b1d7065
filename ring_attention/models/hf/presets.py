"""Well-known models by name: what their config.json says of their shape, so that they can be planned without it."""

import dataclasses
import types
from typing import Any

_LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A model that is known by name.

    Attributes:
      source: the repository on Hugging Face whose config.json has these values.
      values: of that config.json, as far as they say what the model computes.
    """

    source: str
    values: dict[str, Any]


def _preset(source: str, family: str, sizes: str, **others) -> Preset:
    """A row; `sizes`: layers, width, query heads, key/value heads, head_dim, feed-forward, vocabulary, positions."""
    names = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size"
    names += " vocab_size max_position_embeddings"
    values: dict[str, Any] = dict(zip(names.split(), map(int, sizes.split()), strict=True))
    return Preset(source=source, values={"model_type": family, "dtype": "bfloat16"} | values | others)


_LLAMA = dict(rms_norm_eps=1e-5, rope_theta=10_000.0)
_LLAMA3 = dict(rms_norm_eps=1e-5, rope_theta=500_000.0, rope_scaling=_LLAMA3_ROPE)
_LLAMA32 = _LLAMA3 | dict(rope_scaling=_LLAMA3_ROPE | dict(factor=32.0), tie_word_embeddings=True)
_QWEN = dict(rms_norm_eps=1e-6, rope_theta=1_000_000.0, use_sliding_window=False)
_GEMMA2 = dict(rms_norm_eps=1e-6, rope_theta=10_000.0, sliding_window=4096)
_GEMMA3 = dict(
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    rope_local_base_freq=10_000.0,
    rope_scaling=dict(rope_type="linear", factor=8.0),
    sliding_window=1024,
)
_OLMO = dict(rms_norm_eps=1e-6, rope_theta=500_000.0)
_OLMO3 = _OLMO | dict(
    sliding_window=4096,
    rope_scaling=dict(
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=8192,
        attention_factor=1.2079441541679836,
        beta_fast=32.0,
        beta_slow=1.0,
    ),
)
_PHI4_MINI_LONG = (
    "1 1.118320672 1.250641126 1.398617824 1.564103225 1.74916897 1.956131817 2.187582649 2.446418898 2.735880826 "
    "3.059592084 3.421605075 3.826451687 4.279200023 4.785517845 5.351743533 5.984965424 6.693110555 7.485043894 "
    "8.370679318 9.36110372 10.4687158 11.70738129 13.09260651 14.64173252 16.37415215 18.31155283 20.47818807 "
    "22.90118105 25.61086418 28.64115884 32.03 32.1 32.13 32.23 32.6 32.61 32.64 32.66 32.7 32.71 32.93 32.97 33.28 "
    "33.49 33.5 44.16 47.77"
)
_PHI4_MINI_ROPE = dict(
    type="longrope", short_factor=[1.0] * 48, long_factor=[float(factor) for factor in _PHI4_MINI_LONG.split()]
)
_GRANITE = dict(
    rms_norm_eps=1e-5,
    rope_theta=5_000_000.0,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    tie_word_embeddings=True,
)
_MISTRAL = dict(rms_norm_eps=1e-5, rope_theta=100_000_000.0)

PRESETS = types.MappingProxyType(
    {
        "llama-2-7b": _preset("meta-llama/Llama-2-7b-hf", "llama", "32 4096 32 32 128 11008 32000 4096", **_LLAMA),
        "llama-2-13b": _preset("meta-llama/Llama-2-13b-hf", "llama", "40 5120 40 40 128 13824 32000 4096", **_LLAMA),
        "llama-2-70b": _preset("meta-llama/Llama-2-70b-hf", "llama", "80 8192 64 8 128 28672 32000 4096", **_LLAMA),
        "llama-3.1-8b": _preset("meta-llama/Llama-3.1-8B", "llama", "32 4096 32 8 128 14336 128256 131072", **_LLAMA3),
        "llama-3.1-70b": _preset(
            "meta-llama/Llama-3.1-70B", "llama", "80 8192 64 8 128 28672 128256 131072", **_LLAMA3
        ),
        "llama-3.1-405b": _preset(
            "meta-llama/Llama-3.1-405B", "llama", "126 16384 128 8 128 53248 128256 131072", **_LLAMA3
        ),
        "llama-3.2-1b": _preset("meta-llama/Llama-3.2-1B", "llama", "16 2048 32 8 64 8192 128256 131072", **_LLAMA32),
        "llama-3.2-3b": _preset("meta-llama/Llama-3.2-3B", "llama", "28 3072 24 8 128 8192 128256 131072", **_LLAMA32),
        "mistral-7b": _preset(
            "mistralai/Mistral-7B-v0.3",
            "mistral",
            "32 4096 32 8 128 14336 32768 32768",
            rms_norm_eps=1e-5,
            rope_theta=1_000_000.0,
            sliding_window=None,
        ),
        "qwen2.5-7b": _preset("Qwen/Qwen2.5-7B", "qwen2", "28 3584 28 4 128 18944 152064 131072", **_QWEN),
        "qwen2.5-14b": _preset(
            "Qwen/Qwen2.5-14B", "qwen2", "48 5120 40 8 128 13824 152064 131072", **_QWEN | dict(rms_norm_eps=1e-5)
        ),
        "qwen2.5-32b": _preset(
            "Qwen/Qwen2.5-32B", "qwen2", "64 5120 40 8 128 27648 152064 131072", **_QWEN | dict(rms_norm_eps=1e-5)
        ),
        "qwen2.5-72b": _preset(
            "Qwen/Qwen2.5-72B", "qwen2", "80 8192 64 8 128 29568 152064 131072", **_QWEN | dict(rms_norm_eps=1e-5)
        ),
        "qwen3-8b": _preset("Qwen/Qwen3-8B", "qwen3", "36 4096 32 8 128 12288 151936 40960", **_QWEN),
        "qwen3-14b": _preset("Qwen/Qwen3-14B", "qwen3", "40 5120 40 8 128 17408 151936 40960", **_QWEN),
        "qwen3-32b": _preset("Qwen/Qwen3-32B", "qwen3", "64 5120 64 8 128 25600 151936 40960", **_QWEN),
        "gemma-2-2b": _preset("google/gemma-2-2b", "gemma2", "26 2304 8 4 256 9216 256000 8192", **_GEMMA2),
        "gemma-2-9b": _preset("google/gemma-2-9b", "gemma2", "42 3584 16 8 256 14336 256000 8192", **_GEMMA2),
        "gemma-2-27b": _preset(
            "google/gemma-2-27b",
            "gemma2",
            "46 4608 32 16 128 36864 256000 8192",
            query_pre_attn_scalar=144,
            **_GEMMA2,
        ),
        "ministral-8b": _preset(
            "mistralai/Ministral-8B-Instruct-2410",
            "mistral",
            "36 4096 32 8 128 12288 131072 32768",
            sliding_window=32_768,
            **_MISTRAL,
        ),
        "mistral-small-24b": _preset(
            "mistralai/Mistral-Small-24B-Base-2501",
            "mistral",
            "40 5120 32 8 128 32768 131072 32768",
            sliding_window=None,
            **_MISTRAL,
        ),
        "smollm3-3b": _preset(
            "HuggingFaceTB/SmolLM3-3B",
            "smollm3",
            "36 2048 16 4 128 11008 128256 65536",
            rms_norm_eps=1e-6,
            rope_theta=5_000_000.0,
            no_rope_layer_interval=4,
            tie_word_embeddings=True,
        ),
        "phi-4": _preset(
            "microsoft/phi-4",
            "phi3",
            "40 5120 40 10 128 17920 100352 16384",
            rms_norm_eps=1e-5,
            rope_theta=250_000.0,
            original_max_position_embeddings=16_384,
            sliding_window=None,
        ),
        "phi-4-mini": _preset(
            "microsoft/Phi-4-mini-instruct",
            "phi3",
            "32 3072 24 8 128 8192 200064 131072",
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            rope_scaling=_PHI4_MINI_ROPE,
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            sliding_window=262_144,
            tie_word_embeddings=True,
        ),
        "granite-3.1-2b": _preset(
            "ibm-granite/granite-3.1-2b-base",
            "granite",
            "40 2048 32 8 64 8192 49155 131072",
            attention_multiplier=0.015625,
            logits_scaling=8.0,
            **_GRANITE,
        ),
        "granite-3.1-8b": _preset(
            "ibm-granite/granite-3.1-8b-base",
            "granite",
            "40 4096 32 8 128 12800 49155 131072",
            attention_multiplier=0.0078125,
            logits_scaling=16.0,
            **_GRANITE,
        ),
        "command-r7b": _preset(
            "CohereForAI/c4ai-command-r7b-12-2024",
            "cohere2",
            "32 4096 32 8 128 14336 256000 132096",
            layer_norm_eps=1e-5,
            rope_theta=50_000.0,
            logit_scale=0.25,
            sliding_window=4096,
            sliding_window_pattern=4,
            tie_word_embeddings=True,
        ),
        "gemma-3-1b": _preset(
            "google/gemma-3-1b-pt",
            "gemma3_text",
            "26 1152 4 1 256 6912 262144 32768",
            **_GEMMA3 | dict(rope_scaling=None, sliding_window=512),
        ),
        "gemma-3-4b": _preset("google/gemma-3-4b-pt", "gemma3_text", "34 2560 8 4 256 10240 262208 131072", **_GEMMA3),
        "gemma-3-12b": _preset(
            "google/gemma-3-12b-pt", "gemma3_text", "48 3840 16 8 256 15360 262208 131072", **_GEMMA3
        ),
        "gemma-3-27b": _preset(
            "google/gemma-3-27b-pt",
            "gemma3_text",
            "62 5376 32 16 128 21504 262208 131072",
            query_pre_attn_scalar=168,
            **_GEMMA3,
        ),
        "olmo-2-1b": _preset("allenai/OLMo-2-0425-1B", "olmo2", "16 2048 16 16 128 8192 100352 4096", **_OLMO),
        "olmo-2-7b": _preset("allenai/OLMo-2-1124-7B", "olmo2", "32 4096 32 32 128 11008 100352 4096", **_OLMO),
        "olmo-2-13b": _preset("allenai/OLMo-2-1124-13B", "olmo2", "40 5120 40 40 128 13824 100352 4096", **_OLMO),
        "olmo-2-32b": _preset("allenai/OLMo-2-0325-32B", "olmo2", "64 5120 40 8 128 27648 100352 4096", **_OLMO),
        "olmo-3-7b": _preset("allenai/Olmo-3-1025-7B", "olmo3", "32 4096 32 32 128 11008 100278 65536", **_OLMO3),
        "olmo-3-32b": _preset("allenai/Olmo-3-1125-32B", "olmo3", "64 5120 40 8 128 27648 100278 65536", **_OLMO3),
    }
)
"""Name -> Preset."""

REFUSED = types.MappingProxyType(
    {
        "mixtral-8x7b": "is a mixture of experts, which is not implemented",
        "qwen3-30b-a3b": "is a mixture of experts, which is not implemented",
        "gpt-oss-120b": "is a mixture of experts, which is not implemented",
        "llama-4-scout": "is a mixture of experts, which is not implemented",
        "deepseek-v3": "is a mixture of experts with latent attention, which are not implemented",
        "kimi-k2": "is a mixture of experts with latent attention, which are not implemented",
    }
)
"""Names of models for which no shape here would be close, and why."""
