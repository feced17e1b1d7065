"""What the keys of a config.json say of layers that differ, in both generations, and what is refused of a family."""

import dataclasses

import pytest

from ring_attention.checks import ConfigError
from ring_attention.models.hf.config import config_from_hf, config_to_hf, family_for, update_hf
from ring_attention.models.hf.families import FAMILIES
from ring_attention.models.hf.names import PLAIN, is_no_parameter, tensors_of
from ring_attention.models.hf.presets import PRESETS
from ring_attention.models.layer_kinds import LayerKind

SIZES = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
)
FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = dict(rope_type="linear", factor=8.0)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192)
NEW_GEMMA3 = {FULL: LINEAR | dict(rope_theta=1e6), SLIDING: dict(rope_type="default", rope_theta=1e4)}
NEW_OLMO3 = {FULL: YARN | dict(rope_theta=5e5), SLIDING: dict(rope_type="default", rope_theta=5e5)}
LOCAL = LayerKind(window=4096)


def of(family, **values):
    return SIZES | {"model_type": family} | values


def listed(*layers):
    return [FULL if letter == "f" else SLIDING for letter in "".join(layers)]


LAYERS = [  # config.json, windows of its layers
    (of("gemma2"), "wfwfwfwf"),
    (of("gemma2", layer_types=listed("wwwfwwwf")), "wwwfwwwf"),
    (of("gemma3_text"), "wwwwwfww"),
    (of("gemma3_text", sliding_window_pattern=4), "wwwfwwwf"),
    (of("gemma3_text", sliding_window_pattern=4, layer_types=listed("wfwfwfwf")), "wfwfwfwf"),
    (of("gemma3_text", _sliding_window_pattern=4), "wwwwwfww"),
    (of("olmo3", rope_theta=5e5), "wwwfwwwf"),
    (of("olmo2"), "ffffffff"),
    (of("qwen2", use_sliding_window=True, max_window_layers=3), "fffwwwww"),
    (of("qwen2", use_sliding_window=False, max_window_layers=3), "ffffffff"),
    (of("qwen2", use_sliding_window=True), "ffffffff"),  # max_window_layers is 28
    (of("qwen3", use_sliding_window=True, max_window_layers=3, layer_types=listed("wfwfwfwf")), "wfwfwfwf"),
]


@pytest.mark.parametrize(("values", "letters"), LAYERS)
def test_windows_of_layers_follow_from_the_keys_and_back(values, letters):
    config = config_from_hf(values)
    windows = [kind.window for kind in (config.transformer.kinds * 8)[:8]]
    assert windows == [4096 if letter == "w" else 0 for letter in letters]
    assert update_hf(values, config) == values
    assert config_from_hf(config_to_hf(config)) == config


def test_layers_are_the_smallest_period():
    assert config_from_hf(of("gemma2")).model.layers == (LOCAL, LayerKind())
    assert len(config_from_hf(of("gemma3_text")).model.layers) == 6
    assert config_from_hf(of("qwen2", use_sliding_window=True, max_window_layers=7)).model.layers[-2:] == (
        LayerKind(),
        LOCAL,
    )


BOTH_GENERATIONS = [
    (of("gemma3_text", rope_scaling=LINEAR), of("gemma3_text", rope_parameters=NEW_GEMMA3)),
    (
        of("gemma3_text", rope_scaling=LINEAR, rope_theta=1e6, rope_local_base_freq=1e4),
        of("gemma3_text", rope_parameters={FULL: LINEAR, SLIDING: None}, rope_theta=1e6, rope_local_base_freq=1e4),
    ),
    (of("olmo3", rope_scaling=YARN, rope_theta=5e5), of("olmo3", rope_parameters=NEW_OLMO3)),
]


@pytest.mark.parametrize(("old", "new"), BOTH_GENERATIONS)
def test_rotary_positions_by_type_of_layer_are_the_same_in_both_generations(old, new):
    config = config_from_hf(old)
    assert config_from_hf(new) == config
    assert config.model.rope.scaling != "none"
    assert {kind.rope.scaling for kind in config.transformer.kinds if kind.window} == {"none"}
    stretched = dataclasses.replace(config.model.rope, factor=16.0)
    further = dataclasses.replace(config, model=dataclasses.replace(config.model, rope=stretched))
    for values in (old, new):
        assert update_hf(values, config) == values
        updated = update_hf(values, further)
        assert config_from_hf(updated) == further
        assert ("rope_parameters" in updated) == ("rope_parameters" in values)


WRAPPED = dict(
    model_type="gemma3",
    architectures=["Gemma3ForConditionalGeneration"],
    text_config=of("gemma3_text", rope_scaling=LINEAR),
    vision_config={"hidden_size": 8},
    image_token_index=262144,
    mm_tokens_per_image=256,
    torch_dtype="bfloat16",
)


def test_the_text_part_of_a_multimodal_folder_is_a_model():
    config, text = config_from_hf(WRAPPED), config_from_hf(WRAPPED["text_config"])
    assert config == dataclasses.replace(text, wrapper="gemma3")
    stretched = dataclasses.replace(config.model, rope=dataclasses.replace(config.model.rope, factor=16.0))
    updated = update_hf(WRAPPED, dataclasses.replace(config, model=stretched))
    assert updated["text_config"]["rope_scaling"]["factor"] == 16.0
    assert {**updated, "text_config": None} == {**WRAPPED, "text_config": None}


def test_tensors_of_other_parts_are_kept_under_names_of_files():
    config = config_from_hf(WRAPPED)
    for name in ("vision_tower.a.weight", "model.multi_modal_projector.norm"):
        assert is_no_parameter(name, config)
        assert not is_no_parameter(name, dataclasses.replace(config, wrapper=""))
    assert not is_no_parameter("vision_tower./../../a", config)


def test_what_the_short_text_config_of_gemma_3_4b_leaves_out_is_as_its_preset_says():
    text = dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34)
    text |= dict(rope_scaling=LINEAR, sliding_window=1024)
    preset = PRESETS["gemma-3-4b"].values
    assert config_from_hf(text) == config_from_hf(preset)
    assert config_from_hf(text) != config_from_hf(preset | dict(tie_word_embeddings=False))  # the control


REFUSED = [
    (of("gemma2"), "use_bidirectional_attention", True, "after it"),
    (of("gemma2"), "sliding_window", None, "missing"),
    (of("gemma2"), "hidden_activation", "gelu", "gelu_pytorch_tanh"),
    (of("gemma2"), "layer_types", ["chunked_attention"] * 8, "chunked_attention"),
    (of("gemma2"), "attn_logit_softcapping", -1.0, "positive number"),
    (of("gemma2"), "mlp_bias", True, "no biases"),
    (of("gemma3_text"), "attn_logit_softcapping", 50.0, "Gemma 3"),
    (of("gemma3_text"), "rope_parameters", LINEAR, "a section for full_attention"),
    (of("gemma3_text"), "rope_parameters", {FULL: LINEAR}, "a section for full_attention"),
    (of("olmo3", rope_theta=5e5), "rope_theta", 1e4, "disagree"),
    (of("olmo2"), "sliding_window", 64, "this family has none"),
    (of("olmo2"), "clip_qkv", 8.0, "not known"),
    (of("qwen2"), "layer_types", listed("wwwwffff"), "sliding_window"),
    (of("phi3", sliding_window=64), "layer_types", listed("wfwfwfwf"), "alike"),
    (of("llama"), "final_logit_softcapping", 30.0, "in this family"),
    (of("llama"), "query_pre_attn_scalar", 64, "in this family"),
    (WRAPPED, "architectures", ["Gemma3ForSequenceClassification"], "Gemma3ForConditionalGeneration"),
    (WRAPPED, "text_config", None, "object"),
    (WRAPPED, "text_config", of("llama"), "not implemented within 'gemma3'"),
    (WRAPPED, "text_config", of("gemma3_text", final_logit_softcapping=30.0), "caps the logits"),
    (WRAPPED, "quantization_config", {"bits": 4}, "quantized"),
    (WRAPPED, "never_heard_of_it", 1, "not known"),
]


@pytest.mark.parametrize(("values", "key", "value", "says"), REFUSED, ids=[f"{row[1]}={row[2]}" for row in REFUSED])
def test_what_a_family_cannot_be_is_refused_by_name(values, key, value, says):
    config_from_hf(values)  # the control: without it the config is taken
    with pytest.raises(ConfigError, match=says):
        config_from_hf(values | {key: value})


def test_what_a_family_cannot_say_is_refused_by_field():
    config = config_from_hf(of("gemma2"))

    def refused(match, model=config.model, **attention):
        attention = dataclasses.replace(config.attention, **attention)
        with pytest.raises(ConfigError, match=match):
            family_for(model, attention, 4096)

    assert family_for(config.model, config.attention, 8192) == "gemma2"
    refused("attention.sinks=True: a model of the family 'gemma2' can only say False", sinks=True)
    wider = (*config.model.layers[:1], LayerKind(window=64))
    refused("model.layers: window of layer 1=64", dataclasses.replace(config.model, layers=wider))
    refused("model.residual_scale=0.5", dataclasses.replace(config.model, residual_scale=0.5))
    refused("model.activation='clamped_silu'", dataclasses.replace(config.model, activation="clamped_silu"))


def test_several_parameters_may_lie_in_one_tensor():
    row = FAMILIES["llama"]
    name = "{body}layers.{number}.mlp.gate_up_proj.weight"
    fused = {f"layers.feedforward.{half}": (name, "F M -> M F") for half in ("gate", "up")}
    config = config_from_hf(of("llama"))
    plain = tensors_of(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", dataclasses.replace(row, names=fused))
        tensor = tensors_of(config, PLAIN)["model.layers.3.mlp.gate_up_proj.weight"]
    assert tensor.shape == (80, 32)
    assert [(part.parameter, part.layer, part.first) for part in tensor.parts] == [
        ("layers.feedforward.gate", 3, 0),
        ("layers.feedforward.up", 3, 40),
    ]
    assert tensor.parts[1].slices((slice(0, 32), slice(10, 20))) == (slice(50, 60), slice(0, 32))
    assert plain["model.layers.3.mlp.up_proj.weight"].shape == (40, 32)
