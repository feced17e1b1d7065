"""Memory of steps whose state the host keeps, predicted; what is compared with was compiled (docs/planner.md)."""

import dataclasses

import pytest

from ring_attention.hardware.chips import GiB
from ring_attention.hardware.topology import find_topology
from ring_attention.planning.memory import host_traffic, memory_of
from ring_attention.planning.plan import longest_context
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import step_time
from ring_attention.training.config import AttentionConfig, OptimizerConfig, TrainConfig
from scripts.verify import records

LLAMA_8B, LLAMA_70B = (dataclasses.replace(records.MODELS[name], remat="offload_input") for name in ("8B", "70B"))


def share_of(model, pod, tokens, offload, accumulation_steps=1, **changes):
    topology = find_topology(pod)
    config = TrainConfig(
        name="offload",
        model=dataclasses.replace(model, **changes),
        seq_len=tokens,
        batch_size=accumulation_steps,
        num_steps=1000,
        attention=AttentionConfig(impl="splash" if topology.tpu else "cudnn"),
        optimizer=OptimizerConfig(offload=offload, accumulation_steps=accumulation_steps),
    )
    return Share.of(config, topology)


COMPILED = [  # GiB of a device and of its host: jax 0.11.2 for CUDA 13, jax 0.10.2 with libtpu 0.0.42.1, 2026-11-28
    (LLAMA_8B, "h100:1x1", 524_288, "parameters", dict(head_groups=8), 47.15, 232.00),
    (LLAMA_8B, "h100:1x1", 524_288, "moments", dict(head_groups=8), 103.40, 180.00),
    (LLAMA_8B, "h100:1x1", 65_536, "parameters", dict(num_layers=4), 20.23, 15.00),
    (LLAMA_8B, "h100:1x1", 8192, "parameters", dict(num_layers=4, vocab_size=8192), 3.66, 13.25),
    (LLAMA_70B, "h100:1x8", 262_144, "parameters", dict(head_groups=8), 15.29, 167.52),
    (LLAMA_8B, "v5p:2x2x2", 524_288, "parameters", {}, 18.42, None),  # holds a copy of all gradients more on the host
]


@pytest.mark.parametrize(("model", "pod", "tokens", "offload", "changes", "device", "host"), COMPILED)
def test_memory_of_offloaded_state_is_the_compilers(model, pod, tokens, offload, changes, device, host):
    share = share_of(model, pod, tokens, offload, **changes)
    memory = memory_of(share, share.strategy)
    assert memory.total / GiB == pytest.approx(device, rel=0.1)
    assert host is None or memory.host / GiB == pytest.approx(host, rel=0.01)
    kept = share_of(model, pod, tokens, "none", **changes)  # the control of both tolerances
    there = memory_of(kept, kept.strategy)
    assert there.total / GiB > 1.25 * device
    assert there.host < 0.9 * memory.host


def test_what_leaves_the_device_arrives_on_the_host():
    steps = {offload: share_of(LLAMA_8B, "h100:1x8", 262_144, offload) for offload in ("none", "moments", "parameters")}
    memory = {offload: memory_of(share, share.strategy) for offload, share in steps.items()}
    layers, model = 4 * steps["none"].own_layers, LLAMA_8B
    of_matrices = model.num_parameters - 2 * model.vocab_size * model.model_dim
    assert layers == pytest.approx(4 * of_matrices / 8, rel=1e-3)
    assert memory["moments"].host - memory["none"].host == 2 * layers
    assert memory["parameters"].host - memory["none"].host == 4 * layers
    assert memory["none"].total - memory["moments"].total == 2 * layers
    twice = share_of(LLAMA_8B, "h100:1x8", 262_144, "parameters", accumulation_steps=2)
    assert memory_of(twice, twice.strategy).host - memory["parameters"].host == layers


def test_a_step_waits_for_the_state_that_crosses():
    steps = {offload: share_of(LLAMA_8B, "h100:1x1", 4096, offload) for offload in ("none", "moments", "parameters")}
    waits = {offload: step_time(share, share.strategy).host_wait for offload, share in steps.items()}
    assert waits["none"] < waits["moments"] < waits["parameters"]
    link, layers = steps["none"].topology.reached.host_link, 4 * steps["none"].own_layers
    assert waits["moments"] - waits["none"] == pytest.approx(4 * layers / link)
    assert host_traffic(steps["parameters"]) == (3 * layers, 8 * layers)


def test_one_gpu_reaches_the_length_that_others_trained_on_it_by_offloading_alone():
    cell = "8B/h100:1x1"
    best = records.longest(cell)
    assert best.tokens >= records.CELLS[cell][1]
    assert best.config.optimizer.offload == "parameters"
    topology = find_topology("h100:1x1")
    others = [
        share.config for share in records.settings_of(cell, 4096) if share.config.optimizer.offload != "parameters"
    ]
    assert others
    assert not any(longest_context(config, topology) >= records.CELLS[cell][1] for config in others)
