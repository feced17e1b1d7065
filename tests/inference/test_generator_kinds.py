"""Generating with layers that differ: each keeps what its tokens can still see, and prompts are read in pieces."""

import dataclasses

import pytest
from quick_compile import OPTIONS
from test_generator import ATTENTION, MESHES, MODEL, generated, wrong

from ring_attention.inference import programs
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.rope import RopeConfig

NEAR, NOWHERE = LayerKind(window=9), LayerKind(rope=RopeConfig(fraction=0.0))
MODELS = {
    "windows": (dataclasses.replace(MODEL, num_layers=3, layers=(NEAR, LayerKind())), ATTENTION),
    "gpt-oss": (
        dataclasses.replace(
            MODEL,
            num_layers=4,
            layers=(NEAR, NEAR, NOWHERE),
            qkv_bias=True,
            out_bias=True,
            ffn_bias=True,
            activation="clamped_silu",
        ),
        dataclasses.replace(ATTENTION, sinks=True),
    ),
    "gemma": (
        dataclasses.replace(
            MODEL,
            num_layers=3,
            layers=(NEAR, LayerKind()),
            norm_place="both",
            norm_zero_centered=True,
            qk_norm=True,
            activation="gelu_tanh",
            logit_softcap=3.0,
            embedding_scale=4.0,
            attention_scale=0.3,
            tied_embeddings=True,
        ),
        dataclasses.replace(ATTENTION, softcap=2.0),
    ),
    "chunks": (
        dataclasses.replace(MODEL, layers=(LayerKind(chunk=11), NOWHERE), value_head_dim=4, norm_place="parallel"),
        dataclasses.replace(ATTENTION, alibi=True),
    ),
    "olmo": (
        dataclasses.replace(
            MODEL,
            layers=(LayerKind(chunk=12, window=5), LayerKind()),
            norm_place="after",
            qk_norm=True,
            qk_norm_across=True,
        ),
        ATTENTION,
    ),
}
CASES = [("windows", "2", None), ("chunks", "2", 6)]
SLOW = [(name, mesh, chunk) for name in MODELS for mesh, chunk in [("1", None), ("8", None), ("1", 5), ("8", 16)]]
SLOW += [(name, "dp2_sp2_tp2", chunk) for name in MODELS for chunk in (None, 4)]


@pytest.fixture(autouse=True)
def _compile_quickly(monkeypatch):
    monkeypatch.setattr(programs, "compiler_options", lambda mesh: OPTIONS)


@pytest.mark.parametrize(
    ("name", "mesh", "chunk"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_layers_that_differ_generate_what_the_whole_forward_pass_says(name, mesh, chunk):
    model, attention = MODELS[name]
    rows = generated(model, attention, MESHES[mesh], chunk=chunk)
    assert wrong(model, attention, rows) == 0
    assert wrong(another(model), attention, rows) > 0, "the control: layers that see a token more"


def another(model):
    """The model with local layers that see one token more, in a window, or other tokens, in a chunk."""
    first = model.layers[0]
    change = dict(window=first.window + 1) if first.window else dict(chunk=first.chunk + 1)
    return dataclasses.replace(model, layers=(dataclasses.replace(first, **change), *model.layers[1:]))
