"""A run of train.py: everything is opened and checked, then the training loop goes from step to step."""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator

from jax.sharding import Mesh

from ring_attention.attention.device_kind import kind_of_mesh
from ring_attention.attention.kernels.choose import self_tests
from ring_attention.training.batches import Corpus, Feed, HeldOut, digests
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import TrainConfig
from ring_attention.training.devices import keep_freed_memory, open_mesh, return_freed_memory, warn_of_order
from ring_attention.training.fault_tolerance.nonfinite import NonFiniteGuard
from ring_attention.training.fault_tolerance.peers import Peers, program_fields, require_agreement
from ring_attention.training.fault_tolerance.preemption import Preemption
from ring_attention.training.init_from import describe_initial, find_initial, has_begun, initial_state
from ring_attention.training.layout_choice import with_layout
from ring_attention.training.metrics import TrainLog
from ring_attention.training.processes import ProcessFlags, compile_anew_where_needed, is_first, join_processes
from ring_attention.training.run_folder import RunFolder, folder_of, open_run_folder, require_same_contents
from ring_attention.training.state import TrainState, abstract_state, sharded_abstract_state
from ring_attention.training.step import make_train_step
from ring_attention.training.trained_model import TrainedModel
from ring_attention.training.validate import check_attention, check_vocabulary, require_memory, validate_config

_SAME_MACHINES = "give all processes the same chips, drivers and libraries, or name a kernel with attention.impl"
_ALIKE = "start all processes with the same flags, config, versions and settings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run whose inputs were checked and whose folder this process holds, ready for its first step.

    Attributes:
      config: what decides the run.
      mesh: the devices, over all processes.
      peers: the other processes.
      corpus: the documents.
      feed: the batches to train on.
      held_out: the text that the loss is measured on.
      folder: the folder of checkpoints, metrics and the config.
      is_first: whether this process writes and prints for all.
    """

    config: TrainConfig
    mesh: Mesh
    peers: Peers
    corpus: Corpus
    feed: Feed
    held_out: HeldOut
    folder: RunFolder
    is_first: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of a finished run.

    Attributes:
      heldout_bits_per_byte: with the last parameters.
      initial_bits_per_byte: with those that the run began with, where they were a trained model's and it began now.
    """

    heldout_bits_per_byte: float
    initial_bits_per_byte: float | None


@contextlib.contextmanager
def open_run(config: TrainConfig, process_flags: ProcessFlags) -> Iterator[Run]:
    """Join the other processes, check everything that can be known before a step is compiled, and hold the folder.

    Raises:
      ConfigError: if the config cannot run on these devices, with these documents or in this folder, or if the
        processes were not started alike.
      RunError: if the other processes cannot be reached.
    """
    keep_freed_memory()
    num_processes = join_processes(process_flags)
    with Peers() as peers:
        require_agreement("program", program_fields(config), _ALIKE)
        mesh = open_mesh(config.mesh, num_processes)
        compile_anew_where_needed(mesh)
        shape, platform = dict(mesh.shape), mesh.devices.flat[0].platform
        validate_config(config, shape, platform)
        if config.attention.impl == "auto":
            accepts = functools.partial(check_attention, config, shape)
            found = self_tests(kind_of_mesh(mesh), lambda kernel: accepts(kernel=kernel))
            require_agreement("attention kernel", found, _SAME_MACHINES)
        if platform != "cpu":
            return_freed_memory()
        first = is_first()
        say = print if first else lambda line: None
        require_memory(config, mesh)
        corpus = Corpus.open(config.data, folder_of(config).documents)
        check_vocabulary(config, corpus.tokenizer)
        contents = digests(config.data, corpus)
        require_agreement("contents", contents, "let all processes read the same files")
        resumed = has_begun(folder_of(config))
        initial = None if resumed else find_initial(config)
        given, config = config, with_layout(config, corpus, shape, platform)
        feed, held_out = Feed(config, mesh, corpus), HeldOut(config, mesh, corpus)
        with open_run_folder(given, say=say) as folder:
            require_same_contents(folder, contents, has_begun=resumed)
            say(_describe(config, mesh, corpus, initial))
            yield Run(
                config=config,
                mesh=mesh,
                peers=peers,
                corpus=corpus,
                feed=feed,
                held_out=held_out,
                folder=folder,
                is_first=first,
            )


def train(run: Run) -> Result:
    """Train to `config.num_steps`, going on from the newest checkpoint in the run's folder if there is one.

    Every process of the run calls it; the first one writes the metrics and shows the progress. The losses after
    resuming are bitwise those of a run that was never interrupted, on the same machine and mesh. At the end the
    processes part: what follows may take any time in one of them.

    Raises:
      ConfigError: if the disk has no room for the checkpoints, or they are of another model or other documents.
      RunError: if a checkpoint cannot be written, none can be read, or too many steps in a row were not finite.
      Preempted: after SIGTERM or Ctrl-C, when a checkpoint of the last step is on disk.
    """
    config, mesh, folder, feed, held_out = run.config, run.mesh, run.folder, run.feed, run.held_out
    with Preemption() as preemption, Checkpoints(folder.checkpoints, abstract_state(config)) as checkpoints:
        state, evaluated = _start_or_resume(run, checkpoints)
        start = int(state.step)
        train_step = make_train_step(config, mesh)
        guard = NonFiniteGuard(config, mesh, folder.path)
        with TrainLog(config, mesh, folder, held_out, start, evaluated) as log:
            initial = held_out.loss(state.params) if config.init_from and not start else None
            if initial is not None:
                log.add_heldout(0, initial)
            if start and not evaluated and start % config.eval_every == 0:
                log.add_heldout(start, held_out.loss(state.params))
            for step in range(start + 1, config.num_steps + 1):
                rows, batch = next(feed)  # while the devices work on the step before
                guard.settle(state.params)
                checkpoints.check()
                state, numbers = train_step(state, batch)
                guard.watch(step, numbers, batch, rows)
                log.add(step, numbers, rows, config.batch_size)
                last = step == config.num_steps
                preempted = preemption.reached() and not last
                if last or step % config.log_every == 0:
                    log.flush()
                if last or step % config.eval_every == 0 and not preempted:
                    log.add_heldout(step, held_out.loss(state.params))
                if last or preempted or step % config.checkpoint_every == 0:
                    guard.settle(state.params)
                    log.sync()  # what a checkpoint has seen must be in the metrics when a run resumes from it
                    checkpoints.save(step, state, {"position": feed.get_state(), "evaluated": not preempted})
                if preempted:
                    checkpoints.wait()
                    preemption.stop(step, config.num_steps, folder.checkpoints)
    loss = held_out.loss(state.params) if log.heldout_loss is None else log.heldout_loss
    run.peers.disconnect()
    to_bits = held_out.bits_per_byte_of
    return Result(loss * to_bits, None if initial is None else initial * to_bits)


def _start_or_resume(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, bool]:
    """Return the state to go on from, and whether its step was evaluated; one that SIGTERM stopped was not."""
    abstract = sharded_abstract_state(run.config, run.mesh)
    checkpoints.require_room(abstract)
    restored = checkpoints.restore_newest(abstract, warn=_warn)
    if restored is None:
        return initial_state(run.config, run.mesh, run.folder), False
    run.feed.set_state(restored.data["position"])
    if run.is_first:
        print(f"Going on from step {restored.step}.", flush=True)
    return restored.state, restored.data["evaluated"]


def _warn(line: str) -> None:
    print(f"train.py: warning: {line}", file=sys.stderr, flush=True)


def _describe(config: TrainConfig, mesh: Mesh, corpus: Corpus, initial: TrainedModel | None) -> str:
    """Return what a person reads before the first step: what will run, and on what."""
    devices = mesh.devices.flatten()
    if devices[0].platform == "cpu":
        hardware = f"No accelerator found: simulating {devices.size} devices on {os.cpu_count()} CPU cores"
    else:
        hardware = f"Running on {devices.size} x {devices[0].device_kind}"
    processes = len({device.process_index for device in devices})
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"{hardware}{f', in {processes} processes' if processes > 1 else ''}.",
        f"{config.name}: {config.transformer.num_parameters:,} parameters, {config.seq_len:,} tokens of context, "
        f"mesh {shape}, {config.attention.in_words}.",
        f"{len(corpus.train):,} documents to train on, {len(corpus.held_out):,} held out.",
        *corpus.report.lines(),
        *corpus.describe_tokens(config.data),
        *(describe_initial(config, initial) if initial else ()),
        *warn_of_order(config, devices[0].platform),
        "The first step compiles; give it a minute.",
    ]
    return "\n".join(lines)
