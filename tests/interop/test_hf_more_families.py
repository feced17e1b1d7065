"""Families with longrope, layers without positions, multipliers, parallel blocks, pairs, queries that grow."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_parity import (
    BOUND,
    SHAPE,
    VOCABULARY,
    OurModel,
    make_checkpoint,
    mesh_of,
    require_their_gradients,
    their_continuation,
    their_logits,
)
from hf_folders import contents

from ring_attention.inference.generator import Generator
from ring_attention.models.hf.export import write_again
from ring_attention.models.hf.manifest import read_manifest, write_manifest
from ring_attention.training.trained_model import open_trained_model

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("plain_kernel")]

FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LONGROPE = dict(rope_type="longrope", rope_theta=10_000.0, partial_rotary_factor=0.75)  # 12 of 16 turn: 6 pairs
LONGROPE |= dict(short_factor=[1.0, 1.05, 1.1, 1.2, 1.4, 1.5], long_factor=[1.0, 1.3, 2.0, 4.0, 8.0, 16.0])
GROWING = dict(rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=16, mscale=1.0)
GROWING |= dict(mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
MULTIPLIERS = dict(embedding_multiplier=12.0, logits_scaling=2.5, residual_multiplier=0.22, attention_multiplier=0.1)
MINISTRAL = dict(num_hidden_layers=6, head_dim=24, sliding_window=8, layer_types=[FULL, *3 * [SLIDING], FULL, SLIDING])
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
VISION |= dict(image_size=28, patch_size=14, head_dim=16)
GRANITE = dict(num_hidden_layers=2, attention_bias=True, mlp_bias=True) | MULTIPLIERS
FAMILIES = {
    "phi3": (
        *("Phi3Config", "Phi3ForCausalLM"),
        dict(num_hidden_layers=2, sliding_window=24, original_max_position_embeddings=32, rope_parameters=LONGROPE),
    ),
    "smollm3": (
        *("SmolLM3Config", "SmolLM3ForCausalLM"),
        dict(num_hidden_layers=6, no_rope_layer_interval=4, use_sliding_window=True, sliding_window=8, mlp_bias=True),
    ),
    "granite": ("GraniteConfig", "GraniteForCausalLM", GRANITE),
    "cohere2": (
        *("Cohere2Config", "Cohere2ForCausalLM"),
        dict(num_hidden_layers=5, sliding_window=8, logit_scale=0.25, rope_parameters=PLAIN | dict(rope_theta=5e4)),
    ),
    "ministral": ("MinistralConfig", "MinistralForCausalLM", MINISTRAL),
    "ministral3": (
        *("Ministral3Config", "Ministral3ForCausalLM"),
        dict(num_hidden_layers=2, head_dim=24, sliding_window=None, rope_parameters=GROWING),
    ),
    "mistral3": (
        *("Mistral3Config", "Mistral3ForConditionalGeneration"),
        dict(
            text_config=SHAPE | dict(model_type="mistral", num_hidden_layers=2, head_dim=24, sliding_window=8),
            vision_config=VISION,
        ),
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> (folder, model of transformers), made once."""
    made = {}

    def make(family):
        if family not in made:
            config_class, model_class, values = FAMILIES[family]
            folder = tmp_path_factory.mktemp(family)
            values = values if family == "mistral3" else SHAPE | values
            made[family] = folder, make_checkpoint(folder, config_class, model_class, values)
        return made[family]

    return make


MESHES = [(dict(sp=1), "ring"), (dict(sp=2), "all_gather"), (dict(sp=4, tp=2), "ring")]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_beyond_windows_and_original_positions(checkpoint, family):
    folder, model = checkpoint(family)
    theirs = their_logits(model)
    assert 0.2 < theirs.std() < 10
    for axes, strategy in MESHES:
        assert np.abs(OurModel(folder, mesh_of(**axes), strategy).logits() - theirs).max() < BOUND


def test_short_factors_count_up_to_the_original_length(checkpoint):
    folder, model = checkpoint("phi3")
    ours = OurModel(folder, mesh_of(sp=1))
    theirs = their_logits(model, 32)
    assert np.abs(ours.logits(32) - theirs).max() < BOUND
    assert np.abs(ours.logits(96)[:, :32] - theirs).max() > 30 * BOUND  # the control: a longer sequence turns otherwise


def _model(**changes):
    return lambda model, params: (dataclasses.replace(model, **changes), params)


def _rope(**changes):
    return lambda model, params: _model(rope=dataclasses.replace(model.rope, **changes))(model, params)


def _kinds(change):
    return lambda model, params: (dataclasses.replace(model, layers=tuple(map(change, model.layers))), params)


def _turned(kind):
    """A layer without positions gets the rotary embedding of others, but for a base that keeps it a kind."""
    turn = kind.rope is not None and kind.rope.fraction == 0
    return (
        dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, theta=10_001.0, fraction=1.0)) if turn else kind
    )


def _other_window(kind):
    return dataclasses.replace(kind, window=kind.window + 1) if kind.window else kind


def _halves(model, params):
    """Let the pairs that lie side by side in the files be taken for halves."""

    def change(path, x):
        if path[-1].key not in ("query", "key") or path[0].key != "layers":
            return x
        return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)

    return model, jax.tree_util.tree_map_with_path(change, params)


def _exchanged(model, params):
    layers = params["layers"]
    parts = layers["feedforward"]
    parts = parts | dict(gate=parts["up"], up=parts["gate"])
    return model, params | {"layers": layers | {"feedforward": parts}}


CONTROLS = {
    "short factors for long sequences": ("phi3", _rope(long_factors=(1.0, 1.05, 1.1, 1.2, 1.4, 1.5))),
    "longrope's factor of attention left out": ("phi3", _rope(attention_factor=1.0)),
    "gate and up exchanged": ("phi3", _exchanged),
    "positions in a layer without": ("smollm3", _kinds(_turned)),
    "positions in a layer that sees all": ("cohere2", _kinds(_turned)),
    "halves for pairs side by side": ("cohere2", _halves),
    "a norm that leaves the mean": ("cohere2", _model(norm="rms")),
    "logits not scaled": ("cohere2", _model(logit_scale=1.0)),
    "embeddings not scaled": ("granite", _model(embedding_scale=1.0)),
    "residuals not scaled": ("granite", _model(residual_scale=1.0)),
    "scores scaled by width": ("granite", _model(attention_scale=0.0)),
    "a window of one more": ("ministral", _kinds(_other_window)),
    "queries that do not grow": ("ministral3", _rope(query_growth=0.0)),
    "mscale left out": ("ministral3", _rope(attention_factor=0.0)),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_part_that_is_left_out_or_wrong_is_seen(checkpoint, control):
    family, change = CONTROLS[control]
    folder, model = checkpoint(family)
    wrong = OurModel(folder, mesh_of(sp=1), change=change).logits()
    assert np.abs(wrong - their_logits(model)).max() > 30 * BOUND


@pytest.mark.parametrize("family", ["phi3", "smollm3", "granite", "cohere2", "ministral3"])
def test_gradients_are_those_of_torch(checkpoint, family):
    require_their_gradients(*checkpoint(family), sp=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_an_import_gives_the_same_bytes(checkpoint, tmp_path, family):
    folder, _ = checkpoint(family)
    ours = OurModel(folder, mesh_of(sp=1))
    write_manifest(ours.source, tmp_path / "kept")
    (tmp_path / "out").mkdir()
    manifest = read_manifest(tmp_path / "kept")
    write_again(manifest, ours.params, ours.source.config, tmp_path / "out", lambda name, size: None)
    assert contents(tmp_path / "out") == contents(folder)


NEW = 64
PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_those_of_transformers(checkpoint, family):
    folder, model = checkpoint(family)
    want = their_continuation(model, PROMPT, NEW)
    writer = Generator.of(open_trained_model(str(folder)), mesh=mesh_of(sp=4, tp=2), capacity=PROMPT.size + NEW)
    assert [row[0] for row in writer.generate([PROMPT], max_new_tokens=NEW)] == want
    assert len(set(want)) > 5


def test_greedy_continuation_within_the_original_length_takes_the_short_factors(checkpoint):
    folder, model = checkpoint("phi3")
    want = their_continuation(model, PROMPT[:8], 24)
    for capacity, same in ((32, True), (33, False)):  # the control: a cache that could hold more is for long factors
        writer = Generator.of(open_trained_model(str(folder)), mesh=mesh_of(sp=1), capacity=capacity)
        assert ([row[0] for row in writer.generate([PROMPT[:8]], max_new_tokens=24)] == want) is same
