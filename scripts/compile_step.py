"""Compiles a config's whole training step for a pod that is not there, and prints the memory it needs on each device.

pip install -e '.[compile-tpu]' && python scripts/compile_step.py v5e:16x16 --config=configs/tpu_v5e_256_7b.py
pip install -e '.[compile-gpu]' && python scripts/compile_step.py h100:1x8 --config=configs/gpu_8xh100_7b.py

Any field can be overridden as for train.py, for example --config.seq_len=4194304.
"""

import sys
import time

import jax

from ring_attention.checks import ConfigError
from ring_attention.planning.pods import pod_devices
from ring_attention.planning.programs import compile_step
from ring_attention.training.flags import parse_config


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
