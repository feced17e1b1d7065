"""Families whose layers differ, with caps and norms of other places, against transformers, with controls."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import transformers
from family_parity import (
    BOUND,
    LENGTH,
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
from ring_attention.models.hf.export import write_again, write_standard
from ring_attention.models.hf.manifest import write_manifest
from ring_attention.training.trained_model import open_trained_model

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("plain_kernel")]

SLIDING, FULL = "sliding_attention", "full_attention"
SHORT = SHAPE | dict(max_position_embeddings=64)  # fewer than LENGTH
PLAIN = dict(rope_type="default", rope_theta=10_000.0)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
VISION |= dict(image_size=28, patch_size=14)
GEMMA = SHORT | dict(head_dim=24, query_pre_attn_scalar=20, sliding_window=8, final_logit_softcapping=3.0)
GEMMA3 = GEMMA | dict(num_hidden_layers=8)
GEMMA3 |= dict(rope_parameters={FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6), SLIDING: PLAIN})
OLMO3 = {FULL: YARN | dict(rope_theta=5e5, attention_factor=1.2079), SLIDING: PLAIN | dict(rope_theta=5e5)}
QWEN = dict(num_hidden_layers=5, use_sliding_window=True, sliding_window=8)
FAMILIES = {
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA | dict(num_hidden_layers=5, attn_logit_softcapping=2.0)),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3),
    "gemma3": (
        *("Gemma3Config", "Gemma3ForConditionalGeneration"),
        dict(text_config=GEMMA3 | dict(final_logit_softcapping=None), vision_config=VISION, mm_tokens_per_image=4),
    ),
    "qwen2": (
        *("Qwen2Config", "Qwen2ForCausalLM"),
        SHAPE | QWEN | dict(max_window_layers=3, rope_parameters=YARN | dict(rope_theta=1e6)),
    ),
    "qwen3": (
        *("Qwen3Config", "Qwen3ForCausalLM"),
        SHORT | QWEN | dict(head_dim=24, attention_bias=True, layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING]),
    ),
    "olmo2": (
        *("Olmo2Config", "Olmo2ForCausalLM"),
        SHORT | dict(num_hidden_layers=3, rope_parameters=PLAIN | dict(rope_theta=5e5)),
    ),
    "olmo3": (
        *("Olmo3Config", "Olmo3ForCausalLM"),
        SHAPE | dict(num_hidden_layers=6, sliding_window=8, rope_parameters=OLMO3),
    ),
}
OF_EACH_PART = ("gemma2", "gemma3_text", "qwen2", "olmo3")
"""Families that have all the parts between them."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> (folder, model of transformers), made once."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, make_checkpoint(folder, *FAMILIES[family], seed=SEEDS.get(family, 0))
        return made[family]

    return make


SEEDS = {"gemma2": 4, "gemma3_text": 2, "gemma3": 2}
"""Of models whose greedy continuations do not stay with a few tokens."""


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_beyond_windows_and_original_positions(checkpoint, family):
    folder, model = checkpoint(family)
    theirs = their_logits(model)
    assert 0.2 < theirs.std() < 10
    meshes = [(dict(sp=1), "ring"), (dict(sp=2), "ulysses")]
    meshes += [(dict(sp=4, tp=2), "ring")] if family in OF_EACH_PART else []
    for axes, strategy in meshes:
        assert np.abs(OurModel(folder, mesh_of(**axes), strategy).logits() - theirs).max() < BOUND


@pytest.mark.parametrize("family", OF_EACH_PART)
def test_gradients_are_those_of_torch(checkpoint, family):
    require_their_gradients(*checkpoint(family), sp=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_import_is_written_again_byte_by_byte_and_anew_with_the_same_logits(checkpoint, tmp_path, family):
    folder, model = checkpoint(family)
    ours, quiet = OurModel(folder, mesh_of(sp=1)), lambda name, size: None
    for written in ("again", "anew"):
        (tmp_path / written).mkdir()
    manifest, config = write_manifest(ours.source, tmp_path / "kept"), ours.source.config
    write_again(manifest, ours.params, config, tmp_path / "again", quiet)
    assert contents(tmp_path / "again") == contents(folder)
    text = dataclasses.replace(config, wrapper="")
    write_standard(ours.params, text, "float32", tmp_path / "anew", quiet, extra={"pad_token_id": None})
    anew = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "anew", attn_implementation="eager").eval()
    np.testing.assert_array_equal(their_logits(anew), their_logits(model))


NEW = 64
PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 21)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_those_of_transformers(checkpoint, family):
    folder, model = checkpoint(family)
    want = their_continuation(model, PROMPT, NEW)
    writer = Generator.of(open_trained_model(str(folder)), mesh=mesh_of(sp=2), capacity=PROMPT.size + NEW)
    assert [row[0] for row in writer.generate([PROMPT], max_new_tokens=NEW)] == want
    assert len(set(want)) > 5


# --- Controls: each part of a model is one that the comparison sees ---------------------------------------------------


def _model(**changes):
    return lambda model, params: (dataclasses.replace(model, **changes), params)


def _kinds(change):
    return lambda model, params: (dataclasses.replace(model, layers=tuple(map(change, model.layers))), params)


def _window(more):
    return _kinds(lambda kind: dataclasses.replace(kind, window=kind.window and kind.window + more))


def _other_layers(kind):
    return dataclasses.replace(kind, window=None if kind.window else 8)


def _ropes_exchanged(model, params):
    local = next(kind.rope for kind in model.layers if kind.rope)
    layers = tuple(dataclasses.replace(kind, rope=model.rope if kind.rope else None) for kind in model.layers)
    return dataclasses.replace(model, rope=local, layers=layers), params


CONTROLS = {
    "a window of one more": ("gemma2", _window(1)),
    "a window of one less": ("olmo3", _window(-1)),
    "windows in the other layers": ("gemma3_text", _kinds(_other_layers)),
    "rotary positions of the other kind of layer": ("gemma3_text", _ropes_exchanged),
    "local layers scaled as the others": ("olmo3", _kinds(lambda kind: dataclasses.replace(kind, rope=None))),
    "no cap of logits": ("gemma3_text", _model(logit_softcap=0.0)),
    "norms by their weight alone": ("gemma2", _model(norm_zero_centered=False)),
    "scores by the root of the width of a head": ("gemma2", _model(attention_scale=0.0)),
    "embeddings as they are": ("gemma3_text", _model(embedding_scale=1.0)),
    "another activation": ("gemma2", _model(activation="silu")),
    "another epsilon": ("olmo2", _model(norm_epsilon=1e-2)),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_part_that_is_left_out_or_wrong_is_seen(checkpoint, control):
    family, change = CONTROLS[control]
    folder, model = checkpoint(family)
    wrong = OurModel(folder, mesh_of(sp=1), change=change).logits()
    assert np.abs(wrong - their_logits(model)).max() > 30 * BOUND


def test_no_cap_of_scores_is_seen(checkpoint):
    folder, model = checkpoint("gemma2")
    wrong = OurModel(folder, mesh_of(sp=1), softcap=0.0).logits()
    assert np.abs(wrong - their_logits(model)).max() > 30 * BOUND


@pytest.mark.parametrize("cap_first", [True, False])
def test_a_cap_after_the_mask_is_seen(checkpoint, monkeypatch, cap_first):
    folder, model = checkpoint("gemma2")
    ours, at = OurModel(folder, mesh_of(sp=1)), jnp.arange(LENGTH)

    def attend(q, k, v, this, *, segment_ids):
        cap, near = this.kind.softcap, this.kind.window or LENGTH
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
        s = jnp.einsum("bthd,bshd->bhts", q, k) * ours.model.score_scale
        seen = (at[:, None] >= at) & (at[:, None] - at < near)
        capped = lambda s: cap * jnp.tanh(s / cap)  # noqa: E731
        s = jnp.where(seen, capped(s), -jnp.inf) if cap_first else capped(jnp.where(seen, s, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v)

    monkeypatch.setattr("family_parity.attention_of", lambda *others: attend)
    apart = np.abs(ours.logits() - their_logits(model)).max()
    assert apart < BOUND if cap_first else apart > 30 * BOUND
