"""Our rotary frequencies against those of transformers, which has a function for each scaling."""

import dataclasses

import numpy as np
import pytest

from ring_attention.models.hf.rope import RopeFacts, rope_from_hf
from ring_attention.models.rope import RopeConfig, frequencies

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
pytestmark = pytest.mark.interop

ORIGINAL, LONGEST, HEAD_DIM = 4096, 131_072, 128
RAMP = np.linspace(1.0, 48.0, 48).tolist()
YARN = dict(rope_type="yarn", factor=32.0, original_max_position_embeddings=ORIGINAL)
LONGROPE = dict(rope_type="longrope", partial_rotary_factor=0.75, short_factor=[1.0 + x / 60 for x in RAMP])
LONGROPE |= dict(long_factor=RAMP, original_max_position_embeddings=ORIGINAL)
SCALINGS = {
    "longrope": LONGROPE,
    "longrope with a factor": LONGROPE | dict(factor=8.0),
    "longrope with an attention factor": LONGROPE | dict(attention_factor=1.1),
    "longrope of whole heads": LONGROPE
    | dict(partial_rotary_factor=1.0, short_factor=[1.5] * 64, long_factor=[9.0] * 64),
    "longrope of an odd share": LONGROPE
    | dict(partial_rotary_factor=0.3, short_factor=[1.5] * 19, long_factor=[9.0] * 19),
    "yarn": YARN,
    "yarn with an exact ramp": YARN | dict(truncate=False),
    "yarn with scales alike": YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    "yarn with scales": YARN | dict(mscale=0.707, mscale_all_dim=0.4),
    "yarn with one scale": YARN | dict(mscale=1.0, mscale_all_dim=0.0, beta_fast=4.0),
    "yarn by lengths": YARN | dict(factor=None),
    "llama3": YARN | dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_frequencies_and_the_factor_of_attention_are_those_of_transformers(name, length):
    given = SCALINGS[name] | dict(rope_theta=10_000.0)
    sizes = dict(hidden_size=8 * HEAD_DIM, num_attention_heads=8, max_position_embeddings=LONGEST)
    config = transformers.LlamaConfig(**sizes, rope_parameters=dict(given))
    theirs, factor = rope_utils.ROPE_INIT_FUNCTIONS[given["rope_type"]](config, None, seq_len=length)
    rope = rope_from_hf({"rope_parameters": given}, LONGEST, facts=RopeFacts(partial=True))
    ours = frequencies(rope, HEAD_DIM, length)
    plain = frequencies(RopeConfig(theta=rope.theta, fraction=rope.fraction), HEAD_DIM, 0)
    bound = 1e-6 * ours + 2e-7 * plain  # theirs are float32, and the ramp subtracts from 1
    assert (np.abs(ours - theirs.double().numpy()) < bound).all()
    assert rope.magnitude == pytest.approx(factor, rel=1e-6)
    other = frequencies(dataclasses.replace(rope, theta=10_100.0), HEAD_DIM, length)
    assert (np.abs(other - theirs.double().numpy()) > 10 * bound).any()  # the control
