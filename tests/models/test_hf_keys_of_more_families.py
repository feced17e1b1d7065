"""What config.json says of Phi, SmolLM3, Granite, Command R7B, Ministral and Mistral Small, and what is refused."""

import json

import numpy as np
import pytest

from ring_attention.checks import ConfigError
from ring_attention.commands.make_small_hf import small_config
from ring_attention.models.hf.config import FAMILIES, config_from_hf, config_to_hf, update_hf
from ring_attention.models.hf.names import tensors_of

SHAPE = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2)
SHAPE |= dict(num_hidden_layers=4, max_position_embeddings=8192)
FACTORS = dict(short_factor=[1.0] * 6, long_factor=[1, 1.5, 2, 3, 4, 5.5])
PHI = SHAPE | dict(  # the keys of Phi-4-mini, with the names that it has for code
    model_type="phi3",
    architectures=["Phi3ForCausalLM"],
    auto_map={
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    attention_bias=False,
    attention_dropout=0.0,
    embd_pdrop=0.0,
    full_attn_mod=1,
    hidden_act="silu",
    interpolate_factor=1,
    lm_head_bias=False,
    mlp_bias=False,
    original_max_position_embeddings=1024,
    partial_rotary_factor=0.75,
    resid_pdrop=0.0,
    rms_norm_eps=1e-05,
    rope_scaling=FACTORS | dict(type="longrope"),
    rope_theta=10000.0,
    sliding_window=262144,
    tie_word_embeddings=True,
)
SMOLLM = SHAPE | dict(
    model_type="smollm3",
    architectures=["SmolLM3ForCausalLM"],
    layer_types=["full_attention"] * 4,
    max_window_layers=28,
    mlp_bias=False,
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 0, 1, 1],
    pretraining_tp=2,
    rope_scaling=None,
    rope_theta=5000000.0,
    sliding_window=None,
    use_sliding_window=False,
)
GRANITE = SHAPE | dict(
    model_type="granite",
    architectures=["GraniteForCausalLM"],
    attention_multiplier=0.015625,
    embedding_multiplier=12.0,
    logits_scaling=8.0,
    residual_multiplier=0.22,
    tie_word_embeddings=True,
)
COMMAND = SHAPE | dict(
    model_type="cohere2",
    architectures=["Cohere2ForCausalLM"],
    cache_implementation="hybrid",
    head_dim=16,
    layer_norm_eps=1e-05,
    layer_switch=4,
    logit_scale=0.25,
    order_of_interleaved_layers="local_attn_first",
    position_embedding_type="rope_gptj",
    rope_scaling=None,
    rope_theta=50000,
    rotary_pct=1.0,
    sliding_window=32,
    sliding_window_pattern=4,
    use_embedding_sharing=True,
    use_gated_activation=True,
    use_parallel_block=True,
    use_parallel_embedding=False,
    use_qk_norm=False,
)
YARN = dict(
    rope_type="yarn", type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=512, mscale=1.0
)
YARN |= dict(mscale_all_dim=1.0, llama_4_scaling_beta=0.1, beta_fast=32.0, beta_slow=1.0, max_position_embeddings=8192)
MINISTRAL_3 = SHAPE | dict(model_type="ministral3", rope_parameters=YARN, head_dim=24)
MISTRAL = SHAPE | dict(model_type="mistral", sliding_window=32)
WRAPPER = dict(
    model_type="mistral3",
    architectures=["Mistral3ForConditionalGeneration"],
    image_token_index=10,
    multimodal_projector_bias=False,
    projector_hidden_act="gelu",
    spatial_merge_size=2,
    vision_config={"hidden_size": 32, "model_type": "pixtral"},
    vision_feature_layer=-1,
)
ALL = dict(phi3=PHI, smollm3=SMOLLM, granite=GRANITE, cohere2=COMMAND, ministral3=MINISTRAL_3)
ALL |= dict(mistral3=WRAPPER | dict(text_config=MINISTRAL_3), small=WRAPPER | dict(text_config=MISTRAL))


@pytest.mark.parametrize("name", ALL)
def test_keys_as_published_are_read_and_left_as_they_are(name):
    config = config_from_hf(ALL[name])
    assert update_hf(ALL[name], config) == ALL[name]
    assert update_hf(json.loads(json.dumps(ALL[name])), config) == ALL[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_checkpoint_of_every_family_can_be_made(family):
    config = small_config(family)
    written = config_to_hf(config)
    assert config_from_hf(written).facts == config.facts
    assert written["pad_token_id"] is None  # that of Phi's class lies beyond the vocabulary
    assert config.transformer.num_parameters < 3e6


def _positions(values):
    return [bool(kind.rope.fraction) for kind in _kinds(values)]


def _kinds(values):
    model = config_from_hf(values).transformer
    return [model.kinds[number % len(model.kinds)] for number in range(model.num_layers)]


def test_which_layers_have_positions_and_which_a_window():
    assert _positions(SMOLLM) == [True, True, False, True]
    assert _positions(SMOLLM | {"no_rope_layers": None}) == [True, True, True, False]
    assert _positions(SMOLLM | {"no_rope_layers": None, "no_rope_layer_interval": 2}) == [True, False] * 2
    windows = SMOLLM | dict(layer_types=None, use_sliding_window=True, sliding_window=16)
    assert [kind.window for kind in _kinds(windows)] == [0, 0, 16, 0]  # those without positions
    assert [(kind.window, bool(kind.rope.fraction)) for kind in _kinds(COMMAND)] == [(32, True)] * 3 + [(0, False)]
    listed = COMMAND | dict(layer_types=["full_attention", "sliding_attention"] * 2)
    assert [(kind.window, bool(kind.rope.fraction)) for kind in _kinds(listed)] == [(0, False), (32, True)] * 2


def test_a_mistral_model_that_lists_the_types_of_its_layers_is_a_ministral_one():
    values = MISTRAL | dict(layer_types=["full_attention", *["sliding_attention"] * 3])
    assert [kind.window for kind in _kinds(values)] == [0, 32, 32, 32]
    assert [kind.window for kind in _kinds(MISTRAL)] == [32] * 4
    config = config_from_hf(values)
    assert config.family == "ministral"
    assert update_hf(values, config) == values


def test_numbers_of_granite_and_command_scale_what_they_say():
    granite, command = config_from_hf(GRANITE).model, config_from_hf(COMMAND).model
    assert (granite.embedding_scale, granite.residual_scale, granite.logit_scale) == (12.0, 0.22, 0.125)
    assert granite.score_scale == 0.015625
    without = {key: value for key, value in GRANITE.items() if key != "attention_multiplier"}
    assert config_from_hf(without).model.score_scale == 1.0  # as transformers has it, and not the root of the width
    assert (command.logit_scale, command.norm, command.norm_place) == (0.25, "layer", "parallel")
    assert command.tied_embeddings


def test_the_length_of_a_model_with_queries_that_grow_and_its_text_part_are_read():
    rope = config_from_hf(WRAPPER | dict(text_config=MINISTRAL_3)).model.rope
    assert (rope.query_growth, rope.original_len, rope.magnitude) == (0.1, 512, 1.0)


def _columns(name, values, shape):
    """The tensor of that name as one parameter of a layer has it, of whole numbers that count its places."""
    tensor = tensors_of(config_from_hf(values))[f"model.layers.0.self_attn.{name}.weight"]
    assert tensor.shape == shape
    counted = np.arange(np.prod(shape)).reshape(shape)
    return {
        part.parameter.rpartition(".")[2]: (part, counted[part.first : part.first + part.shape[0]])
        for part in tensor.parts
    }


def test_rows_of_fused_weights_are_queries_then_keys_then_values():
    parts = _columns("qkv_proj", PHI, (128, 64))
    assert {name: part.first for name, (part, _) in parts.items()} == {"query": 0, "key": 64, "value": 96}
    for name, heads in (("query", 4), ("key", 2), ("value", 2)):
        part, rows = parts[name]
        np.testing.assert_array_equal(part.to_parameter(rows), rows.reshape(heads, 16, 64).transpose(2, 0, 1))
        one_head = part.slices((slice(0, 64), slice(1, 2), slice(0, 16)))
        assert one_head == (slice(part.first + 16, part.first + 32), slice(0, 64))


def test_pairs_side_by_side_become_halves_and_go_back():
    part, rows = _columns("q_proj", COMMAND, (64, 64))["query"]
    ours = part.to_parameter(rows)
    head = rows.reshape(4, 16, 64)[1]
    np.testing.assert_array_equal(ours[:, 1, :8], head[0::2].T)
    np.testing.assert_array_equal(ours[:, 1, 8:], head[1::2].T)
    np.testing.assert_array_equal(part.to_tensor(ours), rows)
    assert part.slices((slice(0, 64), slice(2, 4), slice(0, 16))) == (slice(32, 64), slice(0, 64))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (PHI | {"lm_head_bias": True}, "lm_head_bias=True: transformers does not read it"),
        (PHI | {"full_attn_mod": 2}, "full_attn_mod=2: transformers does not read it"),
        (PHI | {"mlp_bias": True}, "mlp_bias=True"),
        (PHI | {"resid_pdrop": 0.1}, "resid_pdrop=0.1: dropout"),
        (PHI | {"partial_rotary_factor": 0.5}, "short_factors: length=6: must be 4 numbers"),
        (PHI | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "known are default, longrope"),
        (PHI | {"auto_map": {"AutoConfig": "mine.OtherConfig"}}, "auto_map=.*is not run"),
        (SMOLLM | {"no_rope_layers": [1, 0]}, "no_rope_layers=.*must be 1 or 0 for each of 4 layers"),
        (SMOLLM | {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers=.*must be 1 or 0"),
        (SMOLLM | {"layer_types": ["sliding_attention"] * 4}, "sliding layers without sliding_window"),
        (GRANITE | {"attention_dropout": 0.1}, "attention_dropout=0.1: dropout is not implemented"),
        (COMMAND | {"use_qk_norm": True}, "use_qk_norm=True"),
        (COMMAND | {"position_embedding_type": "alibi"}, "position_embedding_type='alibi': transformers does not"),
        (COMMAND | {"use_parallel_block": False}, "use_parallel_block=False: transformers does not"),
        (COMMAND | {"sliding_window": None}, "sliding_window=None: is missing"),
        (MINISTRAL_3 | {"rope_parameters": {"rope_type": "default"}}, "known are yarn"),
        (MINISTRAL_3 | {"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "layer_types"),
        (MISTRAL | {"rope_parameters": YARN}, "llama_4_scaling_beta=0.1: is not implemented"),
        (WRAPPER | {"text_config": MINISTRAL_3 | {"model_type": "mistral4"}}, "'mistral4': is not implemented within"),
        (WRAPPER | {"text_config": MISTRAL, "quantization_config": {"bits": 8}}, "quantization_config"),
    ],
)
def test_what_these_families_cannot_have_is_refused_by_name(values, words):
    with pytest.raises(ConfigError, match=words):
        config_from_hf(values)
