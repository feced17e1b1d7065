"""The numbers of a run's steps, on their way to the files and the terminal."""

import contextlib
import io
import time
from types import TracebackType

import jax
import numpy as np
from jax.sharding import Mesh

from ring_attention.training.config import TrainConfig
from ring_attention.training.heldout import HeldOut
from ring_attention.training.metrics import MetricsWriter
from ring_attention.training.processes import is_first
from ring_attention.training.progress import TrainProgress
from ring_attention.training.run_folder import RunFolder
from ring_attention.training.survival.errors import RunError
from ring_attention.training.throughput import machine_peak_flops


class TrainLog:
    """Writes and shows the numbers of a run's steps, as a context manager; they stay on the devices until `flush`.

    All processes of a run use it alike, and the first one's has files and a terminal.

    Attributes:
      heldout_loss: the newest, in nats per token; None before there is one.
    """

    def __init__(
        self, config: TrainConfig, mesh: Mesh, folder: RunFolder, held_out: HeldOut, start_step: int, evaluated: bool
    ):
        """Open the files of `folder` to go on after `start_step`, 0 for a new run, `evaluated` or not."""
        files = dict(metrics_path=folder.metrics, tensorboard_dir=folder.tensorboard)
        resume = dict(resume_step=start_step or None, evaluated=evaluated)
        self._metrics = MetricsWriter(**files, **resume) if is_first() else None
        self._progress = TrainProgress(
            num_steps=config.num_steps,
            start_step=start_step,
            plain_every=config.log_every,
            file=None if is_first() else io.StringIO(),
        )
        self._model = config.model
        self._to_bits = held_out.bits_per_byte_of
        self._peak, _ = machine_peak_flops(mesh.devices.flatten().tolist())
        self._waiting: list[tuple[int, dict]] = []
        self._since: float | None = None  # None until the first step is done: that one is mostly compilation
        self._tokens, self._flops = 0, 0.0
        self.heldout_loss: float | None = None

    def add(self, step: int, numbers: dict, rows: dict[str, np.ndarray], batch_size: int) -> None:
        """Take in the metrics of a step, still on the device; its work is counted from `rows` of its batch."""
        self._waiting.append((step, numbers))
        if self._since is None:
            jax.block_until_ready(numbers)
            self._since = time.monotonic()
            self.flush()
        else:
            share = len(rows["tokens"]) / batch_size
            self._tokens += round(rows["tokens"].size / share)
            pairs = visible_pairs(rows["segment_ids"])
            self._flops += self._model.training_flops(rows["tokens"].size, pairs) / share

    def add_heldout(self, step: int, loss: float) -> None:
        """Write a held-out loss, in nats per token."""
        self.flush()
        self.heldout_loss = loss
        self._write(step, {"heldout_loss": loss, "heldout_bits_per_byte": loss * self._to_bits})
        self._progress.update(step, heldout_loss=loss)
        if self._since is not None:
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
            self._write(step, line | {"bits_per_byte": line["loss"] * self._to_bits} | last)
        self._progress.update(
            waiting[-1][0],
            loss=line["loss"],
            tokens_per_second=speed[0] if speed else None,
            peak_share=speed[1] if speed else None,
        )
        self._waiting.clear()

    def sync(self) -> None:
        """Flush, and return when all of it is on disk."""
        self.flush()
        if self._metrics:
            self._metrics.sync()

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        if self._metrics:
            self._metrics.write(step, numbers)

    def _speed(self) -> tuple[float, float | None] | None:
        """(tokens per second, share of the machine's peak) since the last call; None before there is any."""
        if self._tokens == 0:
            return None
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        tokens, flops, self._tokens, self._flops = self._tokens, self._flops, 0, 0.0
        return tokens / seconds, flops / seconds / self._peak if self._peak else None

    def __enter__(self) -> "TrainLog":
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, traceback)
        if self._metrics:
            with contextlib.suppress(RunError, OSError) if error else contextlib.nullcontext():  # the first says why
                self._metrics.close()


def visible_pairs(segment_ids: np.ndarray) -> int:
    """(query, key) pairs that causal attention sees in packed rows [B,T]; the order of tokens does not matter."""
    lengths = [np.unique(row, return_counts=True)[1].astype(np.int64) for row in segment_ids]
    return sum(int((n * (n + 1) // 2).sum()) for n in lengths)
