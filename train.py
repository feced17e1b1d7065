"""Train a Transformer on sequences that are sharded across devices.

python train.py                                  trains the CPU demo, configs/cpu_demo.py
python train.py --config=configs/NAME.py --config.model.num_layers=4 --config.mesh.sp=8
python train.py --help                           every config and every field
"""

import logging
import os
import sys
import traceback

from jax.sharding import Mesh

from ring_attention.evaluation.report import report
from ring_attention.training.config import TrainConfig
from ring_attention.training.corpus import Corpus
from ring_attention.training.devices import open_mesh
from ring_attention.training.feasible import check_feasible, check_vocabulary
from ring_attention.training.flags import parse_config, parse_processes
from ring_attention.training.loop import train
from ring_attention.training.processes import compile_anew_where_needed, is_first, join_processes
from ring_attention.training.run_folder import open_run_folder
from ring_attention.training.survival.errors import FINISHED, Preempted, is_expected, last_words
from ring_attention.training.survival.peers import Peers, leave

DEFAULT_CONFIG = "configs/cpu_demo.py"


def main(argv: list[str]) -> None:
    """Read the config, join the other processes, check everything, train, report."""
    process_flags, argv = parse_processes(argv)
    config = parse_config(argv, DEFAULT_CONFIG)
    num_processes = join_processes(process_flags)
    with Peers() as peers:
        mesh = open_mesh(config.mesh, num_processes)
        compile_anew_where_needed(mesh)
        first = is_first()
        say = print if first else lambda line: None
        check_feasible(config, dict(mesh.shape), mesh.devices.flat[0].platform)
        corpus = Corpus.open(config.data)
        check_vocabulary(config, corpus.tokenizer)
        with open_run_folder(config, say=say) as folder:
            say(describe(config, mesh, corpus))
            result = train(config, mesh, folder, corpus)
            peers.part()
            if first:
                report(config, folder, corpus, result)


def describe(config: TrainConfig, mesh: Mesh, corpus: Corpus) -> str:
    """Say what will run, and on what."""
    devices = mesh.devices.flatten()
    if devices[0].platform == "cpu":
        hardware = f"No accelerator found: simulating {devices.size} devices on {os.cpu_count()} CPU cores"
    else:
        hardware = f"Running on {devices.size} x {devices[0].device_kind}"
    processes = len({device.process_index for device in devices})
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"{hardware}{f', in {processes} processes' if processes > 1 else ''}.",
        f"{config.name}: {config.model.num_parameters:,} parameters, {config.seq_len:,} tokens of context, "
        f"mesh {shape}, {config.attention.in_words}.",
        f"{len(corpus.train):,} documents to train on, {len(corpus.held_out):,} held out.",
        *corpus.report.lines(),
        "The first step compiles; give it a minute.",
    ]
    return "\n".join(lines)


def run(argv: list[str]) -> int:
    """Run `main`; return the exit status, and say in a line on stderr why it is not 0."""
    try:
        main(argv)
        return FINISHED
    except (Exception, KeyboardInterrupt) as error:
        if not is_expected(error):
            traceback.print_exc()
        status, line = last_words(error)
        print(line, file=sys.stderr)
        if not isinstance(error, Preempted):  # the others may never come to the end where JAX would wait for them
            leave(status)
        return status


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(run(sys.argv[1:]))
