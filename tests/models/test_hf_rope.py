"""Rotary keys of config.json that some families alone read, both ways."""

import dataclasses

import pytest

from ring_attention.checks import ConfigError
from ring_attention.models.hf.rope import RopeFacts, rope_from_hf, rope_to_hf
from ring_attention.models.rope import RopeConfig

PHI = RopeFacts(scalings=("default", "longrope"), partial=True)
MINISTRAL = RopeFacts(scalings=("yarn",), query_growth=True)
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4]}
LONG = RopeConfig(
    theta=1e4,
    fraction=0.5,
    scaling="longrope",
    factor=32.0,
    original_len=4096,
    short_factors=(1.0, 1.5),
    long_factors=(2.0, 4.0),
)
GROWN = RopeConfig(theta=1e6, scaling="yarn", factor=16.0, original_len=16_384, attention_factor=1.0, query_growth=0.1)
SPELLINGS = {  # as published with Phi-3's first files, later, and as transformers 5 writes it
    "su": dict(
        rope_scaling={"type": "su", **FACTORS}, partial_rotary_factor=0.5, original_max_position_embeddings=4096
    ),
    "longrope": dict(
        rope_theta=1e4,
        rope_scaling={"rope_type": "longrope", **FACTORS},
        partial_rotary_factor=0.5,
        original_max_position_embeddings=4096,
    ),
    "rope_parameters": dict(
        rope_parameters=FACTORS
        | dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5, original_max_position_embeddings=4096),
        original_max_position_embeddings=4096,
    ),
}
MINISTRAL_3 = dict(
    type="yarn",
    rope_type="yarn",
    rope_theta=1000000.0,
    factor=16.0,
    original_max_position_embeddings=16384,
    max_position_embeddings=262144,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale_all_dim=1.0,
    mscale=1.0,
    llama_4_scaling_beta=0.1,
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_spellings_of_longrope_mean_the_same(spelling):
    assert rope_from_hf(SPELLINGS[spelling], 131_072, facts=PHI) == LONG
    assert rope_from_hf(SPELLINGS[spelling], 65_536, facts=PHI) == dataclasses.replace(LONG, factor=16.0)  # the control


def test_queries_grow_where_the_family_reads_it():
    assert rope_from_hf({"rope_parameters": MINISTRAL_3}, 262_144, facts=MINISTRAL) == GROWN
    still = MINISTRAL_3 | {"llama_4_scaling_beta": 0.0, "mscale_all_dim": 0.0}  # as Devstral 2 has it
    assert rope_from_hf({"rope_parameters": still}, 262_144, facts=MINISTRAL) == dataclasses.replace(
        GROWN, query_growth=0.0, attention_factor=0.0
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("rope", "facts", "max_len"),
    [
        (LONG, PHI, 131_072),
        (LONG, PHI, 200_000),
        (dataclasses.replace(LONG, attention_factor=1.2, fraction=1.0), PHI, 131_072),
        (RopeConfig(theta=1e4, fraction=0.5), PHI, 4096),
        (GROWN, MINISTRAL, 262_144),
        (dataclasses.replace(GROWN, truncate=False, query_growth=0.0), MINISTRAL, 262_144),
    ],
)
def test_what_is_written_is_read_again(nested, rope, facts, max_len):
    values = rope_to_hf(rope, max_len, facts=facts, nested=nested)
    assert ("rope_parameters" in values) == nested
    assert rope_from_hf(values, max_len, facts=facts) == rope
    table = values.get("rope_scaling") or {}
    if rope.scaling == "longrope" and not nested and rope.factor * 4096 == max_len and not rope.attention_factor:
        assert set(table) == {"type", "short_factor", "long_factor"}  # Phi3Config of transformers 4 takes no others


@pytest.mark.parametrize(
    ("rope", "facts", "words"),
    [
        (LONG, RopeFacts(), "model.rope.fraction=0.5: models of this family have none such; use 1"),
        (GROWN, RopeFacts(), "model.rope.query_growth=0.1: models of this family have none such; use 0"),
        (GROWN, PHI, "model.rope.scaling='yarn': models of this family know default, longrope"),
    ],
)
def test_what_the_family_cannot_say_is_refused(rope, facts, words):
    with pytest.raises(ConfigError, match=words):
        rope_to_hf(rope, 131_072, facts=facts)


@pytest.mark.parametrize(
    ("values", "facts", "words"),
    [
        (SPELLINGS["longrope"] | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, PHI, "known are default, longrope"),
        (
            {
                "rope_parameters": SPELLINGS["rope_parameters"]["rope_parameters"],
                "original_max_position_embeddings": 2048,
            },
            PHI,
            "original_max_position_embeddings=4096: but original_max_position_embeddings=2048",
        ),
        (
            {"rope_parameters": MINISTRAL_3 | {"llama_4_scaling_beta": None}},
            MINISTRAL,
            "llama_4_scaling_beta=None: is missing",
        ),
        ({"rope_parameters": MINISTRAL_3}, RopeFacts(), "max_position_embeddings=262144: is not implemented"),
    ],
)
def test_keys_that_the_class_does_not_read_are_refused(values, facts, words):
    with pytest.raises(ConfigError, match=words):
        rope_from_hf(values, 131_072, facts=facts)
