"""What we write, transformers loads: the same logits, and the same ids of tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hf_parity import BOUND, LENGTH, our_logits, their_logits

import ring_attention as ra
from ring_attention.data.tokenizers import ByteTokenizer
from ring_attention.models.config import ModelConfig
from ring_attention.models.hf.config import ALL_BEFORE, HFConfig
from ring_attention.models.hf.export import write_standard
from ring_attention.models.rope import RopeConfig
from ring_attention.models.transformer import abstract_parameters
from ring_attention.training.config import TrainConfig
from ring_attention.training.hf_conversion import write_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.interop]

MODEL = ModelConfig(
    vocab_size=264,
    num_layers=2,
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=80,
    rope=RopeConfig(theta=3e4, scaling="yarn", factor=8.0, original_len=64),
)
MODELS = {
    "llama": (MODEL, 0),
    "mistral": (dataclasses.replace(MODEL, rope=RopeConfig(theta=1e6)), 50),
    "qwen2": (dataclasses.replace(MODEL, qkv_bias=True, tied_embeddings=True), 90),
    "qwen3": (dataclasses.replace(MODEL, qk_norm=True, rope=RopeConfig(scaling="linear", factor=4.0)), 0),
}


def _random(model):
    """Parameters that are all unlike 0 and 1."""
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        return jax.random.normal(next(keys), x.shape) * (0.12 if "norm" not in name else 0.3) + ("norm" in name)

    return jax.tree_util.tree_map_with_path(draw, abstract_parameters(model))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("most", [10**9, 30_000])
def test_a_checkpoint_of_our_own_has_our_logits_in_transformers(tmp_path, family, most):
    model, window = MODELS[family]
    params, mesh = _random(model), ra.make_mesh(devices=jax.devices()[:1])
    params = jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), params)
    attention = dataclasses.replace(ALL_BEFORE, window=window)
    config = HFConfig(family=family, model=model, attention=attention, max_len=LENGTH)
    write_standard(params, config, "float32", tmp_path, lambda name, size: None, extra={}, most=most)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or most > 30_000
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    theirs, ours = their_logits(loaded), our_logits(model, params, mesh, window)
    assert 0.5 < theirs.std() < 10
    assert np.abs(ours - theirs).max() < BOUND
    other = jax.tree.map(lambda x: x * 1.01, params)
    assert np.abs(our_logits(model, other, mesh, window) - theirs).max() > 30 * BOUND  # the control


def test_the_tokenizer_of_bytes_gives_transformers_our_ids(tmp_path):
    write_tokenizer(TrainConfig(name="x", model=MODEL, seq_len=64, num_steps=200), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve\n\tdef f(x):  \U0001f600 "
    assert tokenizer(text)["input_ids"] == [256, *ByteTokenizer().encode(text.encode())]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.bos_token_id == 256
