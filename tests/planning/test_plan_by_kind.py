"""Models whose layers differ are planned layer by layer, and their programs send what the plan adds up."""

import collections
import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from ring_attention.checks import ConfigError
from ring_attention.hardware.topology import find_topology
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.rope import RopeConfig
from ring_attention.parallel.ring import Ring
from ring_attention.planning.advice import advise
from ring_attention.planning.hlo import compiled
from ring_attention.planning.memory import memory_of
from ring_attention.planning.page import make_page
from ring_attention.planning.plan import by_strategy, make_plan, strategies_of
from ring_attention.planning.programs import compile_step
from ring_attention.planning.report import as_json, kind_rows
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import attention_bytes, sent_bytes, step_time
from ring_attention.planning.strategy_map import map_strategies
from ring_attention.training.config import AttentionConfig, MeshConfig, TrainConfig
from ring_attention.training.flags import load_config
from ring_attention.training.state import abstract_state, state_shardings

pytestmark = pytest.mark.usefixtures("plain_kernel")

P, T, WINDOW = 4, 256, 24
RING = MeshConfig(sp=P)
NEAR, FAR = LayerKind(window=WINDOW, rope=RopeConfig(theta=1e4)), LayerKind()
GEMMA = load_config("configs/gemma3_27b.py")


def _share(*, mesh=RING, pod="v5e:2x2", window=WINDOW, model=None, **attention) -> Share:
    """Two periods of two layers with a window and one without, and two more with one."""
    near = dataclasses.replace(NEAR, window=window)
    sizes = dict(vocab_size=96, num_layers=8, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=32)
    attention = AttentionConfig(impl="xla", **attention)
    layers = (near, near, FAR)
    fields = dict(name="kinds", seq_len=T, batch_size=2, num_steps=1000, mesh=mesh, attention=attention)
    config = TrainConfig(model=ModelConfig(**sizes | dict(layers=layers) | (model or {})), **fields)
    return Share.of(config, find_topology(pod))


@functools.cache
def _collectives(**settings) -> list[compiled.Collective]:
    text = compile_step(_share(**settings).config, jax.devices()[:P]).as_text()
    return compiled.collectives(text)


def _permuted(collectives, tokens: int) -> int:
    """Bytes that a device sends in permutes of so many tokens: keys, values, their gradients and segment ids."""
    permutes = [x for x in collectives if x.kind == "collective-permute"]
    return sum(x.sent for x in permutes if all(tokens in array.shape for array in x.arrays))


def test_bytes_of_a_compiled_step_are_the_sum_over_kinds():
    share, found = _share(), _collectives()
    far, near = share.groups
    assert [(group.name, group.layers) for group in share.groups] == [("global", 2), (f"window {WINDOW}", 6)]
    by_kind = {group.kind: attention_bytes(share, group, share.strategy_of(group.kind)) for group in share.groups}
    assert _permuted(found, T // P) == by_kind[far.kind] > 0
    assert _permuted(found, WINDOW - 1) == by_kind[near.kind] > 0
    permutes = sum(x.sent for x in found if x.kind == "collective-permute")
    assert permutes == sum(by_kind.values()) == sent_bytes(share)["attention (sp)"]
    assert permutes == sum(kind.sent for kind in step_time(share, share.strategy).kinds)


def _must_travel(share: Share) -> int:
    """How many tokens of a shard, each as often as it has to go to another device, some device there sees."""
    positions = share.config.attention.make_layout(P).positions(T).reshape(P, -1)
    distances = positions[:, None, :, None] - positions[None, :, None, :]  # [device, source, query, key]
    seen = ((distances >= 0) & (distances < WINDOW)).any(2)
    devices = np.arange(P)
    return sum(int(seen[devices, (devices - shift) % P].any(0).sum()) for shift in range(1, P))


def test_tokens_of_window_layers_go_no_farther_than_somebody_sees_them():
    share, tokens = _share(), collections.Counter()
    for x in _collectives():
        if x.kind == "collective-permute" and all(WINDOW - 1 in array.shape for array in x.arrays):
            assert {(to - at) % P for at, to in x.groups} <= {1, P - 1}, "to a neighbour"
            for array in x.arrays:
                tokens[array.dtype == "s32"] += x.runs * (WINDOW - 1)
    layers = share.groups[1].layers
    must = _must_travel(share)
    assert must == 2 * (WINDOW - 1), "the ends of both chunks of a shard"
    assert tokens[True] == 2 * layers * must, "segment ids in both passes"
    assert tokens[False] == 2 * 3 * layers * must, "K and V in both passes, their gradients in one"


@pytest.mark.parametrize("settings", [dict(local_strategy="all_gather"), dict(window=WINDOW + 8)], ids=str)
def test_bytes_of_a_compiled_step_follow_the_strategy_and_the_window(settings):
    share, found = _share(**settings), _collectives(**settings)
    far, near = share.groups
    expected = {group.kind: attention_bytes(share, group, share.strategy_of(group.kind)) for group in share.groups}
    assert expected[near.kind] != attention_bytes(_share(), _share().groups[1], Ring())
    permutes = sum(x.sent for x in found if x.kind == "collective-permute")
    if settings.get("local_strategy"):
        assert permutes == expected[far.kind]
        others = lambda found: sum(x.sent for x in found if x.kind != "collective-permute")  # noqa: E731
        assert others(found) - others(_collectives()) == expected[near.kind]
    else:
        assert (
            permutes == sum(expected.values()) > sum(x.sent for x in _collectives() if x.kind == "collective-permute")
        )


@pytest.mark.parametrize(
    "parts",
    [
        {},
        dict(norm_place="both", qk_norm=True, value_head_dim=8, out_bias=True, ffn_bias=True),
        dict(norm_place="parallel", qkv_bias=True, qk_norm=True, qk_norm_across=True, tied_embeddings=True),
    ],
    ids=str,
)
def test_own_parameters_are_those_of_a_training_state_of_kinds(parts):
    mesh = MeshConfig(fsdp=2, sp=2, tp=2)
    sinks = (dataclasses.replace(NEAR, sinks=True), NEAR, FAR)
    share = _share(mesh=mesh, pod="v5e:2x4", model=parts | dict(layers=sinks))
    devices = jax.make_mesh(tuple(share.mesh.values()), tuple(share.mesh))
    shapes, shardings = abstract_state(share.config).params, state_shardings(share.config, devices).params
    kept = jax.tree.map(lambda x, sharding: math.prod(sharding.shard_shape(x.shape)), shapes, shardings)
    assert share.own_parameters == sum(jax.tree.leaves(kept))
    assert share.own_layers == sum(jax.tree.leaves(kept["layers"]))


def test_a_model_of_one_kind_is_planned_as_one_whose_kinds_are_alike():
    alike = _share(model=dict(layers=()))
    twice = _share(model=dict(layers=(FAR, dataclasses.replace(FAR, rope=RopeConfig(theta=9.0)))))
    assert [group.layers for group in twice.groups] == [8]
    for share in (alike, twice):
        assert memory_of(share, share.strategy) == memory_of(alike, alike.strategy)
        assert step_time(share, share.strategy) == step_time(alike, alike.strategy)


def test_attention_adds_up_over_kinds():
    """As if there were as many layers of each kind alone."""
    mixed = _share(pod="v5e:2x2")
    far, near = (_share(model=dict(layers=layers)) for layers in ((), (NEAR,)))
    of_far, of_near = (step_time(share, share.strategy) for share in (far, near))
    time = step_time(mixed, mixed.strategy)
    assert time.attention == pytest.approx((2 * of_far.attention + 6 * of_near.attention) / 8)
    assert sent_bytes(mixed)["attention (sp)"] * 8 == sum(
        n * sent_bytes(x)["attention (sp)"] for n, x in ((2, far), (6, near))
    )
    assert time.dense == of_far.dense
    keys = [memory_of(share, share.strategy).parts["keys and values"] for share in (mixed, far, near)]
    assert keys[0] == max(keys) > min(keys)


def test_strategies_vary_for_layers_without_a_window_only():
    share = _share()
    assert {strategy.name for strategy in strategies_of(share)} == {"ring", "all_gather", "ulysses", "usp"}
    for strategy in strategies_of(share):
        kinds = step_time(by_strategy(share, strategy), strategy).kinds
        assert [kind.strategy for kind in kinds] == [strategy.name, "ring"]
    local = _share(model=dict(layers=(NEAR,)))
    assert strategies_of(local) == [local.strategy] == [Ring()]
    assert [kind.strategy for kind in step_time(local, local.strategy).kinds] == ["ring"]


def test_a_local_strategy_without_a_schedule_is_refused_by_its_field():
    share = _share(local_strategy="ring_self_attention")
    with pytest.raises(ConfigError, match="attention.local_strategy='ring_self_attention': the planner does not know"):
        make_plan(share.config, share.topology)


@pytest.fixture(scope="module")
def gemma():
    return make_plan(GEMMA, find_topology("v5p:4x4x8"))


def test_window_layers_of_gemma_send_less_than_a_hundredth(gemma):
    far, near = kind_rows(gemma)
    assert (far["layers"], near["layers"]) == (10, 52)
    assert near["share_of_wire"] < 0.01
    alike = dataclasses.replace(GEMMA, model=dataclasses.replace(GEMMA.model, layers=()))
    (whole,) = kind_rows(make_plan(alike, gemma.share.topology))
    assert far["sent_bytes"] * 62 == whole["sent_bytes"] * 10
    assert near["sent_bytes"] < 0.002 * whole["sent_bytes"]
    assert as_json(gemma)["kinds"] == [far, near]


def test_page_shows_each_kind_of_layer(gemma):
    page = make_page(gemma, None, [], map_strategies(gemma.share, columns=2, rows=2))
    for words in ("10 layers, global: ring on 128 devices", "52 layers, window 1,024: ring on 128 devices"):
        assert words in page


def test_advice_leaves_heads_together_where_a_norm_is_across_them():
    parts = dict(qk_norm=True, qk_norm_across=True)
    share = _share(model=parts)
    assert advise(share.config, share.topology).fastest.share.model.head_groups == 1
