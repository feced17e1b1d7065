import dataclasses
import json

import pytest

from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.models.hf.config import ALL_BEFORE, config_from_hf, config_to_hf, family_for, update_hf
from ring_attention.models.hf.families import FAMILIES
from ring_attention.models.rope import RopeConfig

SHAPE = dict(
    vocab_size=320,
    hidden_size=96,
    intermediate_size=144,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", **SHAPE)
MISTRAL = dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None, **SHAPE)
QWEN2 = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], **SHAPE)
QWEN3 = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=24, **SHAPE)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2] * 8, original_max_position_embeddings=512)

LLAMA_2_7B = {  # as published, but for the names of files
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_llama_2_7b_is_the_model_that_the_paper_describes():
    config = config_from_hf(LLAMA_2_7B)
    assert (config.family, config.attention.window, config.max_len) == ("llama", 0, 4096)
    assert config.model.num_parameters == 6_738_415_616
    assert config.model.rope == RopeConfig(theta=10_000.0)
    assert (config.model.head_dim, config.model.num_kv_heads) == (128, 32)


@pytest.mark.parametrize(("values", "bias", "norm"), [(LLAMA, 0, 0), (MISTRAL, 0, 0), (QWEN2, 1, 0), (QWEN3, 0, 1)])
def test_each_family_has_its_biases_and_norms(values, bias, norm):
    model = config_from_hf(values).model
    assert (model.qkv_bias, model.qk_norm) == (bias, norm)
    assert model.head_dim == (24 if "head_dim" in values else 16)
    assert (model.model_dim, model.num_heads, model.num_kv_heads, model.ffn_dim) == (96, 6, 2, 144)


@pytest.mark.parametrize(
    ("table", "rope"),
    [
        ({"rope_type": "linear", "factor": 4}, RopeConfig(theta=7e4, scaling="linear", factor=4.0)),
        ({"rope_type": "dynamic", "factor": 2.0}, dict(scaling="dynamic", factor=2.0, original_len=4096)),
        ({"rope_type": "yarn", "factor": 4.0}, dict(scaling="yarn", factor=4.0, original_len=4096)),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.5},
            dict(scaling="yarn", factor=4.0, original_len=128, attention_factor=1.5),
        ),
        ({"rope_type": "llama3", **LLAMA3}, dict(scaling="llama3", factor=8.0, original_len=512)),
        (
            {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False},
            dict(scaling="yarn", factor=4.0, original_len=4096, attention_factor=1.0, truncate=False),
        ),
        (
            LONGROPE,
            dict(scaling="longrope", factor=8.0, original_len=512, short_factors=(1.0,) * 8, long_factors=(2.0,) * 8),
        ),
        ({"rope_type": "default"}, dict()),
        (None, dict()),
    ],
    ids=lambda value: value.get("rope_type") if isinstance(value, dict) else None,
)
def test_the_three_ways_to_write_a_scaling_mean_the_same(table, rope):
    rope = rope if isinstance(rope, RopeConfig) else RopeConfig(theta=7e4, **rope)
    old = LLAMA | {"rope_theta": 7e4, "rope_scaling": table}
    older = LLAMA | {"rope_theta": 7e4, "rope_scaling": table and {**table, "type": table["rope_type"]}}
    if table:
        del older["rope_scaling"]["rope_type"]
    new = LLAMA | {"rope_parameters": {"rope_theta": 7e4, **(table or {})}}
    for values in (old, older, new):
        assert config_from_hf(values).model.rope == rope
    without = {key: value for key, value in new.items() if key != "rope_parameters"}
    assert config_from_hf(without).model.rope == RopeConfig(theta=10_000.0)  # the control: a scaling left out differs


@pytest.mark.parametrize(
    ("values", "window"),
    [
        (MISTRAL, 0),
        (MISTRAL | {"sliding_window": 64}, 64),
        ({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, 4096),  # as transformers has it
        (QWEN2 | {"use_sliding_window": False, "sliding_window": 64}, 0),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 64),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, 0),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, 0),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 3}, 64),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 3}, 0),
    ],
)
def test_a_window_holds_in_all_layers_or_in_none(values, window):
    assert (config_from_hf(values).attention.window, config_from_hf(values).model.layers) == (window, ())


PUBLISHED = {  # the keys that each has beside those of LLAMA_2_7B, as published
    "SmolLM2-135M": LLAMA
    | {
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "mlp_bias": False,
        "initializer_range": 0.041666666666666664,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "Yarn-Llama-2-7b-128k": LLAMA
    | {
        "_flash_attn_2_enabled": True,
        "auto_map": {
            "AutoConfig": "configuration_llama.LlamaConfig",
            "AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM",
        },
        "rope_scaling": {
            "factor": 32.0,
            "finetuned": True,
            "original_max_position_embeddings": 128,
            "type": "yarn",
        },
    },
    "Yarn-Mistral-7b-128k": MISTRAL
    | {
        "auto_map": {
            "AutoConfig": "configuration_mistral.MistralConfig",
            "AutoModelForCausalLM": "modeling_mistral_yarn.MistralForCausalLM",
        },
        "max_sequence_length": 4096,
        "sliding_window": 4096,
        "use_cache": True,
        "rope_scaling": {
            "factor": 16.0,
            "finetuned": True,
            "original_max_position_embeddings": 256,
            "type": "yarn",
        },
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN2
    | {
        "attention_dropout": 0.0,
        "max_window_layers": 21,
        "sliding_window": 4096,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "Yi-1.5-6B": LLAMA | {"attention_bias": False, "pad_token_id": 0, "rope_theta": 5000000.0},
    "vicuna-7b-v1.5-16k": LLAMA
    | {
        "max_sequence_length": 4096,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "pad_token_id": 0,
        "use_cache": True,
    },
    "transformers 5": LLAMA
    | {
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "linear",
            "factor": 2.0,
            "original_max_position_embeddings": 4096,
        },
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_checkpoints_that_change_nothing_are_taken(name):
    config_from_hf(PUBLISHED[name])


@pytest.mark.parametrize("name", ["Yarn-Llama-2-7b-128k", "Yarn-Mistral-7b-128k"])
def test_a_yarn_checkpoint_is_that_of_the_same_keys_without_its_code(name):
    values = PUBLISHED[name]
    scaling = {key: value for key, value in values["rope_scaling"].items() if key != "finetuned"}
    plain = {key: value for key, value in values.items() if key != "auto_map"} | {"rope_scaling": scaling}
    assert config_from_hf(values) == config_from_hf(plain)
    assert config_from_hf(values).model.rope.scaling == "yarn"


REFUSED = [
    (LLAMA, "rope_interleaved", True, "two halves"),
    (LLAMA, "auto_map", {"AutoModelForCausalLM": "modeling_x.LlamaMoEForCausalLM"}, "code"),
    (LLAMA, "auto_map", {"AutoModelForCausalLM": "modeling_x.MistralForCausalLM"}, "code"),
    (LLAMA, "auto_map", "modeling_x.LlamaForCausalLM", "code"),
    (LLAMA, "dual_chunk_attention_config", {"chunk_size": 262144}, "chunks"),
    (LLAMA, "quantization", {"group_size": 64, "bits": 4}, "bfloat16"),
    (LLAMA, "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "finetuned": False}, "finetuned"),
    (LLAMA, "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "attn_factor": 1.2}, "attn_factor"),
    (LLAMA, "model_type", "gemma", "llama, mistral, qwen2, qwen3"),
    (LLAMA, "model_type", None, "llama, mistral, qwen2, qwen3"),
    (LLAMA, "model_type", ["llama"], "llama, mistral, qwen2, qwen3"),
    (LLAMA, "architectures", ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
    (LLAMA, "hidden_act", "gelu", "silu"),
    (MISTRAL, "attention_bias", True, "no biases"),
    (QWEN2, "attention_bias", True, "no biases"),
    (QWEN3, "mlp_bias", True, "no biases"),
    (LLAMA, "pretraining_tp", 2, "set it to 1"),
    (LLAMA, "partial_rotary_factor", 0.5, "whole heads"),
    (LLAMA, "attention_dropout", 0.1, "0.0"),
    (LLAMA, "quantization_config", {"bits": 4}, "bfloat16"),
    (LLAMA, "auto_map", {"AutoModel": "code.Model"}, "code"),
    (LLAMA, "final_logit_softcapping", 30.0, "logits"),
    (LLAMA, "attn_logit_softcapping", 50.0, "scores"),
    (LLAMA, "sliding_window", 128, "this family has none"),
    (LLAMA, "never_heard_of_it", 1, "not known"),
    (LLAMA, "num_local_experts", 8, "experts"),
    (LLAMA, "rope_scaling", {"rope_type": "longrope", "factor": 2.0}, "short_factor=None: is missing"),
    (LLAMA, "rope_scaling", LONGROPE | {"short_factor": [1.0, "x"]}, "must be a list of positive numbers"),
    (LLAMA, "rope_scaling", LONGROPE | {"long_factor": [1.0, 0.0]}, "must be a list of positive numbers"),
    (LLAMA, "rope_scaling", LONGROPE | {"long_factor": [1.0]}, "long_factors: length=1: must be 8 numbers"),
    (LLAMA, "rope_scaling", LONGROPE | {"beta_fast": 2.0}, "beta_fast"),
    (LLAMA, "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "mscale": "1"}, "mscale"),
    (LLAMA, "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "truncate": 1.5}, "truncate"),
    (LLAMA, "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta"),
    (LLAMA, "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary"),
    (LLAMA, "rope_scaling", {"rope_type": "linear", "type": "yarn", "factor": 2.0}, "one of them"),
    (LLAMA, "rope_scaling", {"rope_type": "linear"}, "factor"),
    (LLAMA, "rope_scaling", {"rope_type": "linear", "factor": "2"}, "positive number"),
    (LLAMA, "rope_scaling", {"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
    (LLAMA, "rope_scaling", "linear", "object"),
    (
        LLAMA,
        "rope_scaling",
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9},
        "max_position_embeddings=4096",
    ),
    (LLAMA | {"rope_theta": 1e4}, "rope_parameters", {"rope_theta": 5e4, "rope_type": "default"}, "give one of them"),
    (LLAMA, "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    (LLAMA, "rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "full_attention"),
    (QWEN2, "use_mrope", True, "one axis"),
    (QWEN2 | {"sliding_window": 64, "max_window_layers": 0}, "use_sliding_window", "yes", "true or false"),
    (QWEN3, "layer_types", ["sliding_attention"] * 3, "without sliding_window"),
    (QWEN3, "layer_types", ["chunked_attention"] * 3, "chunked_attention"),
    (QWEN3, "layer_types", ["full_attention"], "each of 3 layers"),
    (LLAMA, "hidden_size", None, "missing"),
    (LLAMA, "hidden_size", "large", "whole number"),
    (LLAMA, "hidden_size", 97, "num_attention_heads=6"),
    (LLAMA, "num_hidden_layers", 0, "positive whole number"),
    (LLAMA, "num_hidden_layers", True, "positive whole number"),
    (LLAMA, "num_key_value_heads", 4, "num_heads=6"),
    (LLAMA, "rms_norm_eps", -1.0, "positive number"),
    (LLAMA, "tie_word_embeddings", "no", "true or false"),
]


@pytest.mark.parametrize(("values", "key", "value", "says"), REFUSED, ids=[f"{row[1]}={row[2]}" for row in REFUSED])
def test_what_is_not_implemented_is_refused_by_name_in_one_line(values, key, value, says):
    config_from_hf(values)  # the control: without it the config is taken
    with pytest.raises(ConfigError) as caught:
        config_from_hf(values | {key: value})
    message = str(caught.value)
    assert says in message
    assert key.removeprefix("num_key_value_").partition("_")[0] in message
    assert "; " in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "rope_scaling", "quantization_config", "head_dim"])
def test_null_is_as_if_the_key_were_absent(key):
    assert config_from_hf(LLAMA | {key: None}) == config_from_hf(LLAMA)


ROPES = [
    RopeConfig(theta=1e4),
    RopeConfig(theta=5e7, scaling="linear", factor=4.0),
    RopeConfig(theta=1e4, scaling="dynamic", factor=4.0, original_len=4096),
    RopeConfig(theta=1e6, scaling="yarn", factor=8.0, original_len=512, beta_fast=24.0, attention_factor=1.25),
    RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_len=512, low_freq_factor=2.0),
]
SIZES = dict(
    vocab_size=320,
    num_hidden_layers=3,
    hidden_size=96,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=24,
    intermediate_size=144,
    max_position_embeddings=4096,
)
OURS = ModelConfig(
    vocab_size=320, num_layers=3, model_dim=96, num_heads=6, num_kv_heads=2, head_dim=24, ffn_dim=144, rope=ROPES[0]
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.scaling)
@pytest.mark.parametrize("window", [0, 64])
def test_back_and_forth_is_the_same_config(family, rope, window):
    row = FAMILIES[family]
    growing = dict(rope_type="yarn", factor=8.0, llama_4_scaling_beta=0.1)
    scaled = {"rope_scaling": growing} if row.rope.query_growth else {}
    given = config_from_hf(SIZES | {"model_type": family, "rope_theta": row.layers.thetas[1]} | scaled)
    kind = "default" if rope.scaling == "none" else rope.scaling
    rope = rope if kind in row.rope.scalings else given.model.rope
    model = dataclasses.replace(given.model, rope=rope, layers=())
    config = dataclasses.replace(given, model=model, attention=dataclasses.replace(given.attention, window=window))
    if window and not row.layers.window:
        with pytest.raises(ConfigError, match="attention.window=64"):
            config_to_hf(config)
        return
    if not window and row.layers.full_without_positions:
        with pytest.raises(ConfigError, match="model.rope=.*can only say None"):
            config_to_hf(config)
        return
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    first = {"olmo3": "olmo2"}.get(family, family) if not window else family
    if first in ("mistral", "ministral", "phi3", "smollm3") or first == "ministral3" and not rope.query_growth:
        first = "mistral" if window else "llama"
    assert family_for(model, config.attention, 4096) == first


def test_a_model_with_biases_and_norms_has_no_family():
    with pytest.raises(ConfigError, match="model.qk_norm=True: a model of the family 'qwen2' can only say False"):
        family_for(dataclasses.replace(OURS, qkv_bias=True, qk_norm=True), ALL_BEFORE, 4096)


@pytest.mark.parametrize(
    "source", [LLAMA | {"rope_theta": 1e4}, LLAMA | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}]
)
def test_an_updated_config_keeps_every_other_key_and_the_way_its_rope_is_written(source):
    source = source | {"torch_dtype": "bfloat16", "bos_token_id": 17}
    before = config_from_hf(source)
    assert update_hf(source, before) == source
    stretched = dataclasses.replace(before.model, rope=ROPES[3])
    after = dataclasses.replace(before, model=stretched, max_len=32_768)
    updated = update_hf(source, after)
    assert config_from_hf(updated) == after
    assert (updated["torch_dtype"], updated["bos_token_id"]) == ("bfloat16", 17)
    assert ("rope_parameters" in updated) == ("rope_parameters" in source)
    assert ("rope_scaling" in updated) == ("rope_parameters" not in source)


def test_an_updated_config_has_the_window_of_the_model():
    before = config_from_hf(QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3})
    after = dataclasses.replace(before, attention=dataclasses.replace(before.attention, window=96))
    assert config_from_hf(update_hf(QWEN2 | {"layer_types": ["full_attention"] * 3}, after)) == after
