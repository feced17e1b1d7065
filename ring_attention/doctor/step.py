"""A training step of a small model on these devices: its time and memory, beside what the planner predicts."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from ring_attention.data.packing import FIELDS
from ring_attention.doctor.timing import System, rounds_within, seconds_in_turn
from ring_attention.hardware.chips import CHIPS, Chip, chip_of
from ring_attention.hardware.topology import Topology
from ring_attention.parallel.mesh import make_mesh
from ring_attention.planning.hlo.compiled import memory_of as memory_of_program
from ring_attention.planning.memory import memory_of
from ring_attention.planning.plan import step_flops
from ring_attention.planning.programs import compile_step
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import step_time
from ring_attention.training.attention_config import STRATEGY_OPTIONS
from ring_attention.training.config import MeshConfig, TrainConfig
from ring_attention.training.state import make_state
from ring_attention.training.step import BATCH_SPEC

STAND_IN = "h100"
"""The chip whose figures the planner is asked for where the devices are of none that it knows."""


def small_config(config: TrainConfig, devices: int, tokens: int, layers: int) -> TrainConfig:
    """The config with fewer layers, and one sequence of so many tokens a device in a ring of all devices."""
    plain = {name: type(getattr(config.attention, name))() for name in STRATEGY_OPTIONS}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=min(layers, config.model.num_layers)),
        attention=dataclasses.replace(config.attention, strategy="ring", speeds="", **plain),
        optimizer=dataclasses.replace(config.optimizer, accumulation_steps=1),
        mesh=MeshConfig(sp=devices),
        seq_len=devices * tokens,
        batch_size=1,
        eval_sequences=1,
    )


def share_of(config: TrainConfig, chip: Chip) -> Share:
    """One device's part of the step of a `small_config`."""
    devices = config.mesh.sp
    topology = Topology(name=f"{devices} x {chip.name}", chip=chip, sides=(1, devices))
    return Share(config=config, topology=topology, mesh={"dp": 1, "fsdp": 1, "sp": devices, "tp": 1})


def measure_step(config: TrainConfig, devices: Sequence[jax.Device], repeats: int) -> dict:
    """Run a `small_config` on devices that ran nothing before; memory is of one of them, in bytes."""
    known = chip_of(devices[0].device_kind)
    share = share_of(config, known or CHIPS[STAND_IN])
    program = compile_step(config, devices)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    held = [make_state(config, mesh)]
    rng, shape = np.random.default_rng(0), (config.batch_size, config.seq_len)
    layout = config.attention.make_layout(len(devices))
    fields = dict.fromkeys(FIELDS, np.ones(shape, np.int32))
    fields |= {name: rng.integers(0, config.model.vocab_size, shape, np.int32) for name in ("tokens", "targets")}
    fields["positions"] = layout.positions(config.seq_len)[None].repeat(config.batch_size, 0)
    batch = jax.device_put(fields, NamedSharding(mesh, BATCH_SPEC))

    def run() -> None:
        state, metrics = program(held.pop(), batch)
        held.append(jax.block_until_ready(state))
        if not np.isfinite(metrics["loss"]):
            raise RuntimeError(f"the loss of a training step is {float(metrics['loss'])}")

    system = System("step", run)
    seconds = seconds_in_turn([system], rounds_within([system], repeats, 15.0))["step"]
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    flops = step_flops(share) / seconds / len(devices)
    return {
        "layers": config.model.num_layers,
        "parameters": config.transformer.num_parameters,
        "tokens": config.seq_len // len(devices),
        "seconds": seconds,
        "tokens_per_second": config.seq_len / seconds,
        "mfu": flops / known.flops if known else None,
        "predicted_seconds": step_time(share, share.strategy).total,
        "compiled_bytes": memory_of_program(program).total,
        "peak_bytes": None if None in peaks else max(peaks),
        "predicted_bytes": memory_of(share, share.strategy).total,
        "predicted_for": share.topology.chip.name,
    }
