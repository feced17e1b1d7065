"""Generating with layers that differ: each keeps what its tokens can still see, and prompts are read in pieces."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from quick_compile import OPTIONS
from test_generator import ATTENTION, MESHES, MODEL, generated, wrong

from ring_attention.inference import cache, programs
from ring_attention.inference.cache import KeyValueCache
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.rope import RopeConfig
from ring_attention.parallel import extend

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
    "documents": (
        dataclasses.replace(MODEL, num_layers=3, layers=(NEAR, LayerKind())),
        dataclasses.replace(ATTENTION, max_segment_len=13),
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
CASES = [("windows", "2", None), ("chunks", "2", 6), ("documents", "2", 6)]
SLOW = [(name, mesh, chunk) for name in MODELS for mesh, chunk in [("1", None), ("8", None), ("1", 5), ("8", 16)]]
SLOW += [(name, "dp2_sp2_tp2", chunk) for name in MODELS for chunk in (None, 4)]


@pytest.fixture(autouse=True)
def _compile_quickly(monkeypatch):
    monkeypatch.setattr(programs, "compiler_options", lambda mesh: OPTIONS)
    monkeypatch.setattr(extend, "QUERIES", 4)  # so that pieces take several turns


@pytest.mark.parametrize(
    ("name", "mesh", "chunk"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_layers_that_differ_generate_what_the_whole_forward_pass_says(name, mesh, chunk):
    model, attention = MODELS[name]
    rows = generated(model, attention, MESHES[mesh], chunk=chunk)
    attention = with_documents_as_windows(attention)
    assert wrong(model, attention, rows) == 0
    assert wrong(another(model), attention, rows) > 0, "the control: layers that see a token more"


def with_documents_as_windows(attention):
    """What a token sees in a document that is longer than the longest that attention was promised."""
    window = attention.max_segment_len or attention.window
    return dataclasses.replace(attention, max_segment_len=0, window=window)


def another(model):
    """The model with local layers that see one token more, in a window, or other tokens, in a chunk."""
    first = model.layers[0]
    change = dict(window=first.window + 1) if first.window else dict(chunk=first.chunk + 1)
    return dataclasses.replace(model, layers=(dataclasses.replace(first, **change), *model.layers[1:]))


# --- Mutants ----------------------------------------------------------------------------------------------------------


def _slots_are_too_few(patch):
    slots_of = cache.slots_of
    patch.setattr(cache, "slots_of", lambda kind, *sizes: slots_of(kind, *sizes) - bool(kind.reach))


def _circle_is_a_slot_off(patch):
    positions = KeyValueCache.positions
    patch.setattr(KeyValueCache, "positions", lambda self, lengths: jnp.roll(positions(self, lengths), 1, axis=1))


def _newest_token_is_not_known(patch):
    positions = KeyValueCache.positions
    patch.setattr(KeyValueCache, "positions", lambda self, lengths: positions(self, lengths - 1))


def _padding_takes_slots(patch):
    with_tokens = KeyValueCache.with_tokens

    def mutant(self, layer, k, v, positions, ends, **rest):
        return with_tokens(self, layer, k, v, positions, jnp.full_like(ends, 2**30), **rest)

    patch.setattr(KeyValueCache, "with_tokens", mutant)


def _oldest_tokens_of_a_piece_stay(patch):
    with_tokens = KeyValueCache.with_tokens

    def mutant(self, layer, k, v, positions, ends, *, circle):
        s = self.k.shape[3]
        if circle and positions.shape[1] > s:
            k, v, positions = k[:, :s], v[:, :s], positions[:, :s]
        return with_tokens(self, layer, k, v, positions, ends, circle=circle)

    patch.setattr(KeyValueCache, "with_tokens", mutant)


def _piece_is_written_before_it_is_seen(patch):
    """The slots have lost what the piece's first tokens see, and say so: they hold the tokens of the piece."""
    extend = programs.extend_attention_shard

    def mutant(q, held, *, first, slot_positions, **rest):
        T, slots = q.shape[1], held.slots * jax.lax.axis_size("sp")
        lost = (slot_positions >= 0) & (slot_positions < first + T - slots)
        return extend(q, held, first=first, slot_positions=jnp.where(lost, -1, slot_positions), **rest)

    patch.setattr(programs, "extend_attention_shard", mutant)


def _chunks_are_windows(patch):
    patch.setattr(programs, "mask_of", lambda kind: dict(window=kind.reach))


def _documents_have_no_end(patch):
    patch.setattr("ring_attention.inference.plan.reach_of", lambda attention, kind: kind.reach)


MUTANTS = [
    ("windows", 6, _slots_are_too_few),
    ("windows", None, _circle_is_a_slot_off),
    ("windows", None, _newest_token_is_not_known),
    ("windows", None, _padding_takes_slots),
    ("windows", 18, _padding_takes_slots),
    ("windows", 18, _oldest_tokens_of_a_piece_stay),
    ("windows", 6, _piece_is_written_before_it_is_seen),
    ("chunks", 6, _chunks_are_windows),
    ("documents", 6, _documents_have_no_end),
]


@pytest.mark.parametrize(("name", "chunk", "mutate"), MUTANTS)
def test_generate_by_kinds_mutants_are_seen(name, chunk, mutate, monkeypatch):
    mutate(monkeypatch)
    model, attention = MODELS[name]
    rows = generated(model, attention, MESHES["2"], chunk=chunk)
    assert wrong(model, with_documents_as_windows(attention), rows) > 0
