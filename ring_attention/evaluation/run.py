"""A run from its config to its report, as train.py and scripts/finetune.py make it."""

import os

from jax.sharding import Mesh

from ring_attention.evaluation.report import report
from ring_attention.training.batches import Corpus, Feed, HeldOut
from ring_attention.training.config import TrainConfig
from ring_attention.training.devices import keep_freed_memory, open_mesh, return_freed_memory
from ring_attention.training.fault_tolerance.disk import require_there
from ring_attention.training.fault_tolerance.peers import Peers, program_fields, require_agreement
from ring_attention.training.init_from import describe_initial, find_initial, has_begun
from ring_attention.training.loop import train
from ring_attention.training.processes import ProcessFlags, compile_anew_where_needed, is_first, join_processes
from ring_attention.training.run_folder import digests, folder_of, open_run_folder, require_same_contents
from ring_attention.training.trained import Trained
from ring_attention.training.validate import check_feasible, check_vocabulary, require_memory

_ALIKE = "start all processes with the same flags, config, versions and settings"


def run_training(config: TrainConfig, process_flags: ProcessFlags) -> None:
    """Join the other processes, check everything, train, report; what can go wrong is in `train` and the checks."""
    keep_freed_memory()
    num_processes = join_processes(process_flags)
    with Peers() as peers:
        require_agreement("program", program_fields(config), _ALIKE)
        mesh = open_mesh(config.mesh, num_processes)
        compile_anew_where_needed(mesh)
        if mesh.devices.flat[0].platform != "cpu":
            return_freed_memory()
        first = is_first()
        say = print if first else lambda line: None
        check_feasible(config, dict(mesh.shape), mesh.devices.flat[0].platform)
        require_memory(config, mesh)
        corpus = Corpus.open(config.data, folder_of(config).documents)
        check_vocabulary(config, corpus.tokenizer)
        contents = digests(config.data, corpus)
        require_agreement("contents", contents, "let all processes read the same files")
        resumed = has_begun(folder_of(config))
        initial = None if resumed else find_initial(config)
        feed, held_out = Feed(config, mesh, corpus), HeldOut(config, mesh, corpus)
        with open_run_folder(config, say=say) as folder:
            require_same_contents(folder, contents, has_begun=resumed)
            say(describe(config, mesh, corpus, initial))
            result = train(config, mesh, folder, feed, held_out)
            peers.part()
            if first:
                require_there(folder.metrics)
                report(config, folder, corpus, result)


def describe(config: TrainConfig, mesh: Mesh, corpus: Corpus, initial: Trained | None) -> str:
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
        *corpus.describe_tokens(config.data),
        *(describe_initial(config, initial) if initial else ()),
        "The first step compiles; give it a minute.",
    ]
    return "\n".join(lines)
