"""Train a Transformer on sequences that are sharded across devices.

python train.py                                  trains the CPU demo, configs/cpu_demo.py
python train.py --config=configs/NAME.py --config.model.num_layers=4 --config.mesh.sp=8
python train.py --help                           every config and every field
"""

import dataclasses
import logging
import math
import os
import sys

from jax.sharding import Mesh

from ring_attention.checks import ConfigError
from ring_attention.evaluation.report import report
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.training.config import MeshConfig, TrainConfig
from ring_attention.training.corpus import Corpus
from ring_attention.training.feasible import check_feasible, check_vocabulary
from ring_attention.training.flags import parse_config
from ring_attention.training.loop import train
from ring_attention.training.run_folder import open_run_folder

DEFAULT_CONFIG = "configs/cpu_demo.py"
SIMULATED_DEVICES = 8


def main(argv: list[str]) -> None:
    """Read the config, check it, train, report."""
    config = parse_config(argv, DEFAULT_CONFIG)
    mesh = open_mesh(config.mesh)
    check_feasible(config, dict(mesh.shape), mesh.devices.flat[0].platform)
    corpus = Corpus.open(config.data)
    check_vocabulary(config, corpus.tokenizer)
    folder = open_run_folder(config)
    describe(config, mesh, corpus)
    report(config, folder, corpus, train(config, mesh, folder, corpus))


def open_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all accelerators or, where there are none, over as many simulated devices as it needs."""
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    simulate_devices(fixed if -1 not in sizes.values() else fixed * max(1, SIMULATED_DEVICES // fixed))
    try:
        return make_mesh(**sizes)
    except ValueError as error:
        raise ConfigError(f"{error} (--config.mesh.sp=-1 takes all that are left)") from error


def describe(config: TrainConfig, mesh: Mesh, corpus: Corpus) -> None:
    """Say what will run, and on what."""
    devices = mesh.devices.flatten()
    if devices[0].platform == "cpu":
        print(f"No accelerator found: simulating {devices.size} devices on {os.cpu_count()} CPU cores.")
    else:
        print(f"Running on {devices.size} x {devices[0].device_kind}.")
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(
        f"{config.name}: {config.model.num_parameters:,} parameters, {config.seq_len:,} tokens of context, "
        f"mesh {shape}, {config.attention.in_words}.\n"
        f"{len(corpus.train):,} documents to train on, {len(corpus.held_out):,} held out. "
        f"The first step compiles; give it a minute.",
        flush=True,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the newest checkpoint.", file=sys.stderr)
        sys.exit(130)
