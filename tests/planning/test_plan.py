import ast
import contextlib
import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from model_attention import attention_alone

from ring_attention import planning
from ring_attention.attention.kernels import cudnn
from ring_attention.checks import ConfigError
from ring_attention.hardware.topology import find_topology
from ring_attention.models.config import REMAT_POLICIES, ModelConfig
from ring_attention.parallel.mesh import SEQUENCE
from ring_attention.parallel.strategies import STRATEGIES, find_strategy, scheduled
from ring_attention.planning.memory import memory_of
from ring_attention.planning.plan import Plan, longest_context, make_plan, strategies_of
from ring_attention.planning.report import as_json
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import attention_times
from ring_attention.planning.strategy_map import map_strategies
from ring_attention.training.attention_config import STRATEGY_OPTIONS
from ring_attention.training.config import MeshConfig
from ring_attention.training.flags import load_config
from ring_attention.training.state import abstract_state, state_shardings

GPU, TPU = "configs/gpu_8xh100_7b.py", "configs/tpu_v5e_256_7b.py"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_config(TPU), find_topology("v5e:16x16"))


@pytest.mark.parametrize("mesh", [dict(fsdp=2, sp=2, tp=2), dict(dp=2, sp=4, tp=1), dict(sp=8)])
def test_own_parameters_are_those_of_the_training_state(mesh):
    config = dataclasses.replace(load_config("configs/tiny.py"), mesh=MeshConfig(**mesh))
    sizes = Share.of(config, find_topology("v5e:2x4")).mesh
    devices = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    shapes, shardings = abstract_state(config).params, state_shardings(config, devices).params
    kept = jax.tree.map(lambda x, sharding: math.prod(sharding.shard_shape(x.shape)), shapes, shardings)
    assert Share.of(config, find_topology("v5e:2x4")).own_parameters == sum(jax.tree.leaves(kept))


def test_make_plan_recommends_the_fastest_that_fits(plan):
    assert plan.recommended.fits
    fitting = [candidate.time.total for candidate in plan.candidates if candidate.fits]
    assert plan.recommended.time.total <= 1.02 * min(fitting)
    assert plan.reason


def test_make_plan_recommends_nothing_too_large():
    config = dataclasses.replace(load_config(TPU), seq_len=2**22)
    plan = make_plan(config, find_topology("v5e:16x16"))
    too_large = [candidate.label for candidate in plan.candidates if not candidate.fits]
    assert "all_gather" in too_large
    assert plan.recommended.label not in too_large


def test_make_plan_says_which_context_would_fit():
    config = dataclasses.replace(load_config(TPU), seq_len=2**25)
    plan = make_plan(config, find_topology("v5e:16x16"))
    assert plan.recommended is None
    assert not plan.own.fits
    assert 2**20 < plan.longest < 2**25


def test_longest_context_fits_and_a_longer_one_does_not():
    config, topology = load_config(GPU), find_topology("h100:1x8")
    longest = longest_context(config, topology)
    assert make_plan(dataclasses.replace(config, seq_len=longest), topology).own.fits
    assert not make_plan(dataclasses.replace(config, seq_len=longest + longest // 32), topology).own.fits


def test_make_plan_parts_of_time_and_memory_add_up(plan):
    model = dataclasses.replace(load_config(TPU).model, remat="offload")
    topology = plan.share.topology
    slow = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, host_link=1e8))
    waiting = make_plan(dataclasses.replace(load_config(TPU), model=model, seq_len=2**18), slow)
    assert waiting.own.time.host_wait > 0, "a control: otherwise the sum would hold without it"
    for candidate in [*plan.candidates, *waiting.candidates]:
        assert 0 < candidate.mfu < 1
        assert candidate.time.total == pytest.approx(
            sum(value for value in vars(candidate.time).values() if isinstance(value, float))
        )
    assert plan.memory.total == sum(plan.memory.parts.values())


@pytest.mark.parametrize("tied", [False, True])
def test_training_flops_are_three_forward_passes(tied):
    """The backward pass counts twice the forward pass, attention too; what is computed again does not count."""
    sizes = dict(vocab_size=64, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=32)
    layer = 2 * 16 * 8 * (4 + 2) + 3 * 16 * 32 + 2 * 16  # matrices and norms
    tokens, pairs = 10, 10 * 11 // 2
    forward = 2 * tokens * (3 * layer + 64 * 16 + 16) + 3 * 4 * 4 * 8 * pairs
    for remat in REMAT_POLICIES:
        model = ModelConfig(**sizes, tied_embeddings=tied, remat=remat)
        assert model.training_flops(tokens, model.visible_pairs([tokens])) == 3 * forward


@pytest.mark.parametrize("strategy", ["sparse", "ring_self_attention"])
def test_make_plan_refuses_a_strategy_without_a_schedule(strategy):
    config = load_config("configs/tiny.py")
    attention = dataclasses.replace(config.attention, strategy=strategy, stride=64 if strategy == "sparse" else 0)
    with pytest.raises(ConfigError, match=f"attention.strategy='{strategy}': the planner does not know.*plan with one"):
        make_plan(dataclasses.replace(config, attention=attention), find_topology("v5e:2x4"))


def test_attention_times_are_known_or_refused_by_name():
    share = make_plan(load_config("configs/tiny.py"), find_topology("v5e:2x4")).share
    timed = set()
    for name in STRATEGIES:
        with contextlib.suppress(ConfigError):
            timed |= {name} if attention_times(share, find_strategy(name), False).total else set()
    assert timed == set(scheduled(share.work())) == {"ring", "sliding_window", "all_gather", "ulysses", "usp"}


def test_make_plan_refuses_unequal_devices():
    config = load_config("configs/tiny.py")
    attention = dataclasses.replace(config.attention, speeds="1 1 1 1 1 1 1 2")
    with pytest.raises(ConfigError, match="attention.speeds='1 1 1 1 1 1 1 2': .*leave it out"):
        make_plan(dataclasses.replace(config, attention=attention), find_topology("v5e:2x4"))


@pytest.mark.parametrize(
    ("impl", "pod", "hosts_fit"),
    [("cudnn", "h100:1x8", True), ("cudnn", "h100:16x8", False), ("xla", "h100:16x8", True)],
)
def test_make_plan_advises_what_the_kernel_can_compute(monkeypatch, impl, pod, hosts_fit):
    zeros = lambda q, *_: (jnp.zeros_like(q), jnp.zeros_like(q[..., 0], jnp.float32))  # noqa: E731
    monkeypatch.setattr(cudnn, "_attention", zeros)  # JAX takes 0.1 s to trace a real call
    config = load_config(GPU)
    attention = dataclasses.replace(config.attention, impl=impl)
    config = dataclasses.replace(config, attention=attention, mesh=MeshConfig(), seq_len=2**19)
    share = make_plan(config, find_topology(pod)).share
    labels = [candidate.label for candidate in make_plan(config, find_topology(pod)).candidates]
    assert ("all_gather" in labels) == hosts_fit
    if not hosts_fit:  # the very call that a training step makes is traced, nothing compiled
        for strategy in strategies_of(share):
            assert trace_attention(config.attention, share, strategy).shape == (1, 2**19, 32, 128)


def test_what_make_plan_leaves_out_cannot_be_traced():
    config = load_config(GPU)
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, impl="cudnn"), seq_len=2**19)
    share = Share.of(dataclasses.replace(config, mesh=MeshConfig()), find_topology("h100:16x8"))
    with pytest.raises(ValueError, match="this kernel would need 511 calls"):
        trace_attention(config.attention, share, find_strategy("all_gather"))


def trace_attention(attention, share, strategy):
    """What a step's attention by `strategy` gives, traced for the share's mesh."""
    options = {name: getattr(strategy, name, 0) or 0 for name in STRATEGY_OPTIONS}
    attention = dataclasses.replace(attention, strategy=strategy.name, **options)
    fn = attention_alone(attention, share.model, share.ring)
    shape, tokens = (1, share.config.seq_len), jax.P(None, SEQUENCE)
    q, kv = (
        jax.ShapeDtypeStruct((*shape, heads, share.model.head_dim), share.model.compute_dtype)
        for heads in (share.heads, share.kv_heads)
    )
    specs = dict(in_specs=(tokens,) * 4, out_specs=tokens)
    sharded = jax.shard_map(
        lambda q, k, v, segments: fn(q, k, v, segment_ids=segments),
        mesh=jax.sharding.AbstractMesh((share.ring,), (SEQUENCE,), axis_types=(jax.sharding.AxisType.Auto,)),
        **specs,
    )
    return jax.eval_shape(sharded, q, kv, kv, jax.ShapeDtypeStruct(shape, jnp.int32))


def test_make_plan_of_twice_the_context_scales_its_parts(plan):
    config = dataclasses.replace(load_config(TPU), seq_len=2 * 2_097_152)
    longer = make_plan(config, find_topology("v5e:16x16"))
    assert longer.memory.parts["activations"] == pytest.approx(2 * plan.memory.parts["activations"], rel=1e-6)
    assert longer.own.time.attention > 3 * plan.own.time.attention
    assert longer.own.time.dense == pytest.approx(2 * plan.own.time.dense)


def test_memory_of_does_not_grow_with_the_pod():
    config = load_config(TPU)
    totals = []
    for name in ("v4:2x2x4", "v4:4x4x8", "v4:8x8x8"):
        topology = find_topology(name)
        sized = dataclasses.replace(config, mesh=MeshConfig(), seq_len=8192 * topology.devices)
        memory = make_plan(sized, topology).memory
        state = sum(memory.parts[part] for part in ("parameters", "optimizer", "gradients"))
        totals.append(memory.total - state)
    assert max(totals) < 1.01 * min(totals)


def test_as_json_is_plain(plan):
    read = json.loads(json.dumps(as_json(plan)))
    assert read["memory"]["total"] == plan.memory.total
    assert {"ring", "all_gather"} < {row["strategy"] for row in read["strategies"]}


def test_make_plan_refuses_a_mesh_of_another_size():
    with pytest.raises(ConfigError, match=r"v5e:4x4 has 16") as error:
        make_plan(load_config(TPU), find_topology("v5e:4x4"))
    assert "\n" not in str(error.value)


def test_map_strategies_gives_slow_links_to_all_gather(plan):
    found = map_strategies(plan.share, columns=5, rows=4)
    gather = found.families.index("all_gather")
    per_row = (found.best == gather).sum(1)
    assert per_row[0] >= per_row[-1]
    assert (found.best == found.families.index("none fits"))[:, -1].all() or found.tokens[-1] < 65_536


def test_planning_names_no_strategy():
    for path in Path(planning.__file__).parent.rglob("*.py"):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not words & set(STRATEGIES), f"{path.name} names a strategy; ask it for its facts"


def test_a_plan_has_the_kernel_and_the_tiles_that_auto_takes_on_the_pod():
    tpu = make_plan(load_config(TPU), find_topology("v5e:16x16")).share
    assert (tpu.attention.kernel.name, tpu.kernel_reason_of(tpu.main_kind)) == ("splash", "")
    assert (tpu.attention.blocks.q, tpu.attention.blocks.kv) == (512, 1024)
    config = load_config(GPU)
    gpu = make_plan(config, find_topology("h100:1x8")).share
    assert (gpu.attention.kernel.name, gpu.attention.blocks.heads) == ("cudnn", 8)
    capped = dataclasses.replace(config, attention=dataclasses.replace(config.attention, softcap=30.0))
    gpu = make_plan(capped, find_topology("h100:1x8")).share
    assert gpu.attention.kernel.name == "xla"
    assert "has no softcap" in gpu.kernel_reason_of(gpu.main_kind)


def test_a_kernel_of_nvidias_is_refused_on_amds_gpus():
    config = load_config(GPU)
    attention = dataclasses.replace(config.attention, impl="cudnn")
    with pytest.raises(ConfigError, match="'cudnn': AMD Instinct MI300X is driven by ROCm.*; use impl=\"auto\""):
        Share.of(dataclasses.replace(config, attention=attention), find_topology("mi300x:1x8"))
    assert Share.of(config, find_topology("mi300x:1x8")).attention.kernel.name == "xla"


@pytest.mark.parametrize(
    ("mesh", "part"),
    [(dict(dp=4, sp=128), dict(dp=2, sp=128)), (dict(sp=512), dict(sp=256)), (dict(fsdp=2, sp=256), {})],
)
def test_slices_are_the_outermost_of_the_mesh(mesh, part):
    config = dataclasses.replace(load_config(TPU), mesh=MeshConfig(**mesh), batch_size=8, eval_sequences=8)
    share = Share.of(config, find_topology("2xv5e:16x16"))
    assert share.slice_mesh == dict(dp=1, fsdp=1, sp=256, tp=1) | part


def test_a_ring_over_slices_has_room_for_what_comes_from_links_and_from_slices():
    def in_flight(pod, **mesh):
        config = dataclasses.replace(load_config(TPU), mesh=MeshConfig(**mesh), batch_size=2, eval_sequences=2)
        share = Share.of(dataclasses.replace(config, seq_len=8192 * mesh["sp"]), find_topology(pod))
        return memory_of(share, share.strategy).parts["keys and values"]

    assert in_flight("2xv5e:4x4", sp=32) == 2 * in_flight("v5e:4x8", sp=32)
    assert in_flight("2xv5e:4x4", dp=2, sp=16) == in_flight("v5e:4x8", dp=2, sp=16)


def test_groups_of_heads_share_what_a_ring_holds_and_not_what_all_gather_does():
    """All-gather has keys of one head at a time as it is, so that fewer heads leave it as much."""
    config = load_config(GPU)

    def held(strategy, groups):
        model = dataclasses.replace(config.model, head_groups=groups)
        share = Share.of(dataclasses.replace(config, model=model), find_topology("h100:1x8"))
        return memory_of(share, find_strategy(strategy)).parts["keys and values"]

    assert held("ring", 4) == pytest.approx(held("ring", 1) / 4, rel=0.01)
    assert held("all_gather", 4) == pytest.approx(held("all_gather", 1), rel=0.01)
    assert held("all_gather", 8) == pytest.approx(held("all_gather", 1) / 2, rel=0.01)  # no second head on its way
