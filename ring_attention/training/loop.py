"""The training loop: from a config, a mesh and documents to a folder of checkpoints, metrics and a plot."""

import dataclasses
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ring_attention.data.loader import TrainLoader
from ring_attention.parallel.mesh import SEQUENCE
from ring_attention.training.checkpoints import Checkpoints, abstract_like
from ring_attention.training.config import TrainConfig
from ring_attention.training.corpus import Corpus
from ring_attention.training.heldout import HeldOut
from ring_attention.training.metrics import MetricsWriter
from ring_attention.training.progress import TrainProgress
from ring_attention.training.run_folder import RunFolder
from ring_attention.training.step import BATCH_SPEC, TrainState, make_state, make_train_step
from ring_attention.training.throughput import machine_peak_flops


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Attributes:
      heldout_bits_per_byte: of the last parameters.
      held_out: the text that they were measured on.
    """

    heldout_bits_per_byte: float
    held_out: HeldOut


def train(config: TrainConfig, mesh: Mesh, folder: RunFolder, corpus: Corpus) -> Result:
    """Train to `config.num_steps`, going on from the newest checkpoint in `folder` if there is one.

    The losses after resuming are bitwise those of a run that was never interrupted, on the same machine and mesh.
    """
    loader = _open_loader(config, mesh, corpus)
    held_out = HeldOut(config, mesh, corpus)
    sharding = NamedSharding(mesh, BATCH_SPEC)
    with Checkpoints(folder.checkpoints) as checkpoints:
        state = _start_or_resume(config, mesh, checkpoints, loader)
        start = int(state.step)
        train_step = make_train_step(config, mesh)
        metrics = MetricsWriter(folder.metrics, folder.tensorboard, resume_step=start or None)
        progress = TrainProgress(num_steps=config.num_steps, start_step=start, plain_every=config.log_every)
        with metrics, progress:
            log = _Log(config, metrics, progress, held_out, mesh)
            for step in range(start + 1, config.num_steps + 1):
                batch = next(loader)
                state, numbers = train_step(state, jax.device_put(batch, sharding))
                log.add(step, numbers, batch)
                last = step == config.num_steps
                if last or step % config.log_every == 0:
                    log.flush()
                if last or step % config.eval_every == 0:
                    log.add_heldout(step, held_out.loss(state.params))
                if last or step % config.checkpoint_every == 0:
                    log.flush()  # what a checkpoint has seen must be in the metrics when a run resumes from it
                    checkpoints.save(step, state, loader.get_state())
    loss = held_out.loss(state.params) if log.heldout_loss is None else log.heldout_loss
    return Result(loss * held_out.bits_per_byte_of, held_out)


def _open_loader(config: TrainConfig, mesh: Mesh, corpus: Corpus) -> TrainLoader:
    return TrainLoader(
        corpus.train,
        corpus.tokenizer,
        seed=config.data.seed,
        streams=config.data.streams,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        layout=config.attention.make_layout(mesh.shape[SEQUENCE]),
    )


def _start_or_resume(config: TrainConfig, mesh: Mesh, checkpoints: Checkpoints, loader: TrainLoader) -> TrainState:
    state = make_state(config, mesh)
    latest = checkpoints.latest_step()
    if latest is not None:
        state, position = checkpoints.restore(latest, abstract_like(state))
        loader.set_state(position)
    return state


class _Log:
    """Numbers on their way to the files and the terminal; they stay on the device until `flush`, so steps overlap."""

    def __init__(
        self, config: TrainConfig, metrics: MetricsWriter, progress: TrainProgress, held_out: HeldOut, mesh: Mesh
    ):
        self._model = config.model
        self._metrics, self._progress = metrics, progress
        self._to_bits = held_out.bits_per_byte_of
        self._peak, _ = machine_peak_flops(mesh.devices.flatten().tolist())
        self._waiting: list[tuple[int, dict]] = []
        self._since: float | None = None  # None until the first step is done: that one is mostly compilation
        self._tokens, self._flops = 0, 0.0
        self.heldout_loss: float | None = None

    def add(self, step: int, numbers: dict, batch: dict[str, np.ndarray]) -> None:
        """Take in the metrics of a step, still on the device, and count its work."""
        self._waiting.append((step, numbers))
        if self._since is None:
            jax.block_until_ready(numbers)
            self._since = time.monotonic()
            self.flush()
        else:
            self._tokens += batch["tokens"].size
            pairs = visible_pairs(batch["segment_ids"])
            self._flops += self._model.training_flops(batch["tokens"].size, pairs)

    def add_heldout(self, step: int, loss: float) -> None:
        """Write a held-out loss, in nats per token."""
        self.flush()
        self.heldout_loss = loss
        self._metrics.write(step, {"heldout_loss": loss, "heldout_bits_per_byte": loss * self._to_bits})
        self._progress.update(step, heldout_loss=loss)
        self._since = time.monotonic()

    def flush(self) -> None:
        """Write what waits, and show the newest."""
        if not self._waiting:
            return
        waiting = jax.device_get(self._waiting)
        speed = self._speed()
        for step, numbers in waiting:
            line = {name: float(number) for name, number in numbers.items()}
            last = {"tokens_per_second": speed[0]} if speed and step == waiting[-1][0] else {}
            self._metrics.write(step, line | {"bits_per_byte": line["loss"] * self._to_bits} | last)
        self._progress.update(
            waiting[-1][0],
            loss=line["loss"],
            tokens_per_second=speed[0] if speed else None,
            peak_share=speed[1] if speed else None,
        )
        self._waiting.clear()

    def _speed(self) -> tuple[float, float | None] | None:
        """(tokens per second, share of the machine's peak) since the last call; None before there is any."""
        if self._tokens == 0:
            return None
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        tokens, flops, self._tokens, self._flops = self._tokens, self._flops, 0, 0.0
        return tokens / seconds, flops / seconds / self._peak if self._peak else None


def visible_pairs(segment_ids: np.ndarray) -> int:
    """(query, key) pairs that causal attention sees in packed rows [B,T]; the order of tokens does not matter."""
    lengths = [np.unique(row, return_counts=True)[1].astype(np.int64) for row in segment_ids]
    return sum(int((n * (n + 1) // 2).sum()) for n in lengths)
