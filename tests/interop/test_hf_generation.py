"""Continuations of Hugging Face's checkpoints are those of transformers, token for token."""

import dataclasses

import jax
import numpy as np
import pytest
from test_hf_parity import MESHES, SHAPE, make_checkpoint

import ring_attention as ra
from ring_attention.inference.generator import Generator
from ring_attention.training.trained_model import open_trained_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.interop

NEW, LENGTHS = 24, (90, 7)
PROMPTS = [np.random.default_rng(n).integers(0, SHAPE["vocab_size"], n) for n in LENGTHS]
CASES = [("llama", "llama3"), ("mistral-window", "default"), ("qwen2", "yarn"), ("qwen3", "linear")]


def _theirs(model):
    """Greedy continuations, each prompt alone."""
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)

    def continued(prompt):
        tokens = torch.as_tensor(prompt)[None]
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, prompt.size :].tolist()

    return [continued(prompt) for prompt in PROMPTS]


def _ours(folder, mesh, **change):
    trained = open_trained_model(str(folder))
    trained = dataclasses.replace(trained, config=dataclasses.replace(trained.config, **change))
    writer = Generator.of(trained, mesh=mesh, capacity=128)
    return [list(row) for row in zip(*writer.generate(PROMPTS, max_new_tokens=NEW), strict=True)]


@pytest.mark.parametrize(("family", "rope"), CASES)
def test_greedy_continuations_are_those_of_transformers(tmp_path, family, rope):
    want = _theirs(make_checkpoint(tmp_path, family, rope, 1e4))
    mesh = ra.make_mesh(**MESHES["sp4-tp2"], devices=jax.devices())
    assert _ours(tmp_path, mesh) == want
    assert all(len(set(row)) > 5 for row in want)
    config = open_trained_model(str(tmp_path)).config
    other = dataclasses.replace(config.attention, window=5)
    assert _ours(tmp_path, mesh, attention=other) != want, "the control"
