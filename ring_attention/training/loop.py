"""The training loop: from a config, a mesh and documents to a folder of checkpoints, metrics and a plot."""

import dataclasses
import sys

from jax.sharding import Mesh

from ring_attention.training.batches import Feed, HeldOut
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import TrainConfig
from ring_attention.training.fault_tolerance.nonfinite import NonFiniteGuard
from ring_attention.training.fault_tolerance.preemption import Preemption
from ring_attention.training.init_from import initial_state
from ring_attention.training.metrics import TrainLog
from ring_attention.training.processes import is_first
from ring_attention.training.run_folder import RunFolder
from ring_attention.training.state import TrainState, sharded_abstract_state
from ring_attention.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Attributes:
      heldout_bits_per_byte: of the last parameters.
      initial_bits_per_byte: of those that the run began with, where they were a trained model's and it began now.
      held_out: the text that they were measured on.
    """

    heldout_bits_per_byte: float
    initial_bits_per_byte: float | None
    held_out: HeldOut


def train(config: TrainConfig, mesh: Mesh, folder: RunFolder, feed: Feed, held_out: HeldOut) -> Result:
    """Train to `config.num_steps`, going on from the newest checkpoint in `folder` if there is one.

    Every process of the run calls it; the first one writes the metrics and shows the progress. The losses after
    resuming are bitwise those of a run that was never interrupted, on the same machine and mesh.

    Raises:
      ConfigError: if the disk has no room for the checkpoints, or they are of another model or other documents.
      RunError: if a checkpoint cannot be written, none can be read, or too many steps in a row were not finite.
      Preempted: after SIGTERM or Ctrl-C, when a checkpoint of the last step is on disk.
    """
    with Preemption() as preemption, Checkpoints(folder.checkpoints) as checkpoints:
        state, evaluated = _start_or_resume(config, mesh, folder, checkpoints, feed)
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
    return Result(
        loss * held_out.bits_per_byte_of, None if initial is None else initial * held_out.bits_per_byte_of, held_out
    )


def _start_or_resume(
    config: TrainConfig, mesh: Mesh, folder: RunFolder, checkpoints: Checkpoints, feed: Feed
) -> tuple[TrainState, bool]:
    """The state to go on from, and whether its step was evaluated, which one that was stopped by SIGTERM is not."""
    abstract = sharded_abstract_state(config, mesh)
    checkpoints.require_room(abstract)
    restored = checkpoints.restore_newest(abstract, warn=_warn)
    if restored is None:
        return initial_state(config, mesh, folder), False
    feed.set_state(restored.data["position"])
    if is_first():
        print(f"Going on from step {restored.step}.", flush=True)
    return restored.state, restored.data["evaluated"]


def _warn(line: str) -> None:
    print(f"train.py: warning: {line}", file=sys.stderr, flush=True)
