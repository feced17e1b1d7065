"""Layers that differ: which layer is of which kind, and where its parameters are."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind, LayerLoop
from ring_attention.models.rope import RopeConfig
from ring_attention.models.transformer import Transformer, abstract_parameters, parameter_specs
from ring_attention.training.attend import alibi_slopes
from ring_attention.training.config import AttentionConfig
from ring_attention.training.config_values import config_from_dict, config_to_dict, spelt
from ring_attention.training.flags import load_config, override

NEAR, FAR, SINKS = LayerKind(window=8), LayerKind(), LayerKind(sinks=True)
MODEL = ModelConfig(
    vocab_size=32, num_layers=7, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=24, layers=(NEAR, FAR)
)
PERIODS = [(NEAR,), (NEAR, FAR), (NEAR, NEAR, FAR), (FAR, NEAR, NEAR, FAR), (NEAR, FAR, SINKS, FAR, NEAR)]


@pytest.mark.parametrize("layers", range(1, 13))
@pytest.mark.parametrize("kinds", PERIODS, ids=len)
def test_every_layer_has_the_kind_of_its_place_in_the_period(kinds, layers):
    loop = LayerLoop.of(kinds, layers)
    found = {number: run.kind for run in loop.runs for number in run.numbers}
    assert found == {number: kinds[number % len(kinds)] for number in range(layers)}
    # in the order in which the loop goes through them
    in_period = [run.numbers[p * run.length : (p + 1) * run.length] for p in range(9) for run in loop.periodic]
    order = [*itertools.chain(*in_period), *itertools.chain(*(run.numbers for run in loop.rest))]
    assert order == list(range(layers))
    assert len({run.path for run in loop.runs}) == len(loop.runs)
    assert all(len(run.numbers) == run.count for run in loop.runs)


def test_a_loop_of_very_many_layers_is_told_at_once():
    assert LayerLoop.of((NEAR, FAR), 2**40).runs[1].count == LayerLoop.of((NEAR,), 2**39).runs[0].count == 2**39


def test_layers_that_are_alike_are_one_stack_whatever_the_period():
    plain = dataclasses.replace(MODEL, layers=())
    twice = dataclasses.replace(MODEL, layers=(FAR, FAR))
    assert jax.tree.structure(parameter_specs(twice)) == jax.tree.structure(parameter_specs(plain))
    paths = flatten_dict(parameter_specs(MODEL))
    assert {path[1] for path in paths if path[0] == "layers"} == {"run0", "run1", "rest0"}


def test_layers_of_a_run_are_drawn_each_for_itself():
    params = nnx.to_pure_dict(nnx.state(Transformer(MODEL, nnx.Rngs(0)), nnx.Param))
    queries = [params["layers"][name]["attention"]["query"] for name in ("run0", "run1", "rest0")]
    assert [x.shape[0] for x in queries] == [3, 3, 1]
    drawn = np.concatenate([np.asarray(x).reshape(len(x), -1) for x in queries])
    assert np.abs(np.corrcoef(drawn) - np.eye(7)).max() < 0.2


PARTS = dict(
    sinks=dict(layers=(SINKS, FAR)),
    gemma=dict(norm_place="both", norm_zero_centered=True, qk_norm=True, tied_embeddings=True),
    cohere=dict(norm_place="parallel", norm="layer", value_head_dim=4),
    olmo=dict(norm_place="after", qk_norm=True, qk_norm_across=True, layers=(NEAR, SINKS, SINKS)),
    biased=dict(qkv_bias=True, out_bias=True, ffn_bias=True, value_head_dim=12, layers=(SINKS,)),
)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_num_parameters_counts_every_part(parts):
    model = dataclasses.replace(MODEL, **parts)
    assert model.num_parameters == sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_parameters(model)))


@pytest.mark.parametrize("kind", [FAR, NEAR, LayerKind(chunk=5), LayerKind(chunk=5, window=3)], ids=spelt)
def test_visible_pairs_are_those_of_the_mask(kind):
    lengths = [1, 4, 5, 13, 26]
    pairs = 0
    for n in lengths:
        q, k = np.arange(n)[:, None], np.arange(n)[None]
        sees = (q >= k) & (q - k < (kind.window or n)) & (q // (kind.chunk or n) == k // (kind.chunk or n))
        pairs += sees.sum()
    assert kind.visible_pairs(lengths) == pairs
    model = dataclasses.replace(MODEL, layers=(kind, FAR))
    of_all = sum(n * (n + 1) // 2 for n in lengths)
    assert model.visible_pairs(lengths) == 4 * pairs + 3 * of_all


def test_section_attention_decides_what_kinds_leave_open():
    attention = AttentionConfig(window=64, softcap=2.0, sinks=True)
    model = dataclasses.replace(MODEL, layers=(LayerKind(window=0), LayerKind(softcap=0.0, local=True), NEAR))
    first, second, third = attention.completed(model).layers
    assert [kind.window for kind in (first, second, third)] == [0, 64, 8]
    assert [kind.softcap for kind in (first, second, third)] == [2.0, 0.0, 2.0]
    assert all(kind.sinks and kind.rope == model.rope for kind in (first, second, third))
    assert [kind.is_local for kind in (first, second, third)] == [False, True, True]
    completed = attention.completed(model)
    assert attention.completed(completed) == completed


def test_strategies_of_kinds_are_those_of_the_config():
    attention = AttentionConfig(strategy="ulysses", local_strategy="all_gather")
    assert (attention.make_strategy().name, attention.make_local_strategy().name) == ("ulysses", "all_gather")
    assert AttentionConfig(strategy="ulysses").make_local_strategy().name == "ring"
    assert AttentionConfig(duplex=True).make_local_strategy().duplex


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "model.layers=5: is int; give a list of objects"),
        ("[5]", "model.layers.0=5: is a section; give an object with its fields"),
        ("[{]", "model.layers='[{]': must be a list of objects; write it like --config.model.layers=[]"),
        ('[{}, {"windw": 4}]', "model.layers.1.windw=4: there is no such field; did you mean window? it has window"),
        ('[{"window": 4.5}]', "model.layers.0.window=4.5: is float; give a whole number"),
        ('[{"window": -1}]', "model.layers: window=-1: must not be negative; 0 leaves it out"),
        ('[{"rope": {"fraction": 2.0}}]', "model.rope.fraction=2.0: must lie between 0 and 1"),
        ('[{"rope": {"fraction": 0.4}}]', "model.head_dim=8: must be even in each layer (rotary pairs), but"),
    ],
)
def test_layers_that_mean_nothing_are_refused_in_a_line(text, message):
    with pytest.raises(ConfigError) as error:
        override(load_config("configs/tiny.py"), [f"--config.model.layers={text}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_on_the_command_line_are_those_of_a_file():
    config = override(load_config("configs/tiny.py"), ['--config.model.layers=[{"window": 8}, {"rope": {"theta": 9}}]'])
    layers = (NEAR, LayerKind(rope=RopeConfig(theta=9.0)))
    assert config.model.layers == layers
    assert config_from_dict(config_to_dict(config)) == config
    assert override(config, [f"--config.model.layers={spelt(layers)}"]) == config


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(alibi_slopes(12)[:8], alibi_slopes(8))
    np.testing.assert_allclose(alibi_slopes(12)[8:], [2 ** -(0.5 + i) for i in range(4)], rtol=1e-6)
