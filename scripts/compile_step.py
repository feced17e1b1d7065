"""Compiles a config's whole training step for a pod that is not there, and prints the memory it needs on each device.

pip install -e '.[compile-tpu]' && python scripts/compile_step.py v5e:16x16 --config=configs/tpu_v5e_256_7b.py
pip install -e '.[compile-gpu]' && python scripts/compile_step.py h100:1x8 --config=configs/gpu_8xh100_7b.py

Any field can be overridden as for train.py, for example --config.seq_len=4194304.
"""

import dataclasses
import sys
import time

import jax
from jax.sharding import NamedSharding

from ring_attention.checks import ConfigError
from ring_attention.data.packing import FIELDS
from ring_attention.parallel.mesh import make_mesh
from ring_attention.planning.pods import pod_devices
from ring_attention.training.config import TrainConfig
from ring_attention.training.feasible import check_feasible
from ring_attention.training.flags import parse_config
from ring_attention.training.step import BATCH_SPEC, abstract_state, make_train_step, state_shardings


def compile_step(config: TrainConfig, devices: list[jax.Device]):
    """The compiled training step, from shapes alone."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    check_feasible(config, dict(mesh.shape), mesh.devices.flat[0].platform)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_state(config),
        state_shardings(config, mesh),
    )
    shape = (config.batch_size, config.seq_len)
    batch = jax.ShapeDtypeStruct(shape, jax.numpy.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    return make_train_step(config, mesh).lower(state, dict.fromkeys(FIELDS, batch)).compile()


def main(argv: list[str]) -> None:
    """Compile and print."""
    topology, *flags = argv or [""]
    devices = pod_devices(topology)
    config = parse_config(flags, "configs/tpu_v5e_256_7b.py")
    start = time.monotonic()
    program = compile_step(config, devices)
    memory, GiB = program.memory_analysis(), 2**30
    state = memory.argument_size_in_bytes
    total = state + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(f"{config.name} for {len(devices)} x {devices[0].device_kind}, compiled in {time.monotonic() - start:.0f} s")
    print(f"{config.model.num_parameters:,} parameters, {config.seq_len:,} tokens of context")
    print(f"memory per device: {total / GiB:.1f} GiB, of which parameters, optimizer and batch {state / GiB:.1f} GiB")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # compile for the pod, run nowhere
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"compile_step.py: error: {error}", file=sys.stderr)
        sys.exit(2)
