"""The numbers of a run's steps: a JSONL file for programs, TensorBoard for people, and the log that feeds both."""

import contextlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from jax.sharding import Mesh
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from ring_attention.checks import require
from ring_attention.training.batches import HeldOut
from ring_attention.training.config import TrainConfig
from ring_attention.training.devices import machine_peak_flops
from ring_attention.training.fault_tolerance.disk import require_there, writing
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.processes import is_first
from ring_attention.training.progress import TrainProgress
from ring_attention.training.run_folder import RunFolder


class MetricsWriter:
    """Writes every number twice: as a line of JSON and as a TensorBoard scalar.

    A run that goes on from the checkpoint of step s drops what it had written about later steps, so that in the end the
    file is that of a run that was never interrupted. In a multi-process run only one process makes a writer.
    """

    def __init__(self, metrics_path: Path, tensorboard_dir: Path, *, resume_step: int | None, evaluated: bool = True):
        """Open the files.

        Args:
          metrics_path: the JSONL file, made if there is none.
          tensorboard_dir: the folder of TensorBoard's event files.
          resume_step: the step of the checkpoint that the run goes on from; None starts over and keeps nothing.
          evaluated: whether that step was, when the checkpoint was written; if not, it will be, and counts once.

        Raises RunError, here and later, where a file cannot be written or was removed; OSError where the disk is full.
        """
        self._path = metrics_path
        with writing(metrics_path):
            self._open(metrics_path, tensorboard_dir, resume_step, evaluated)

    def _open(self, metrics_path: Path, tensorboard_dir: Path, resume_step: int | None, evaluated: bool) -> None:
        kept = [] if resume_step is None else _lines_up_to(metrics_path, resume_step, evaluated)
        partial = metrics_path.with_name(f".{metrics_path.name}.partial")
        partial.write_text("".join(map(_to_line, kept)), encoding="utf-8")
        partial.replace(metrics_path)
        self._tensorboard = _EventFile(tensorboard_dir, purge_step=0 if resume_step is None else resume_step + 1)
        self._file = metrics_path.open("a", encoding="utf-8")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write `numbers` (anything that float() takes; ints stay ints) of `step`, and flush the JSONL file.

        JSON has no word for numbers that are not finite; they are written as null.
        """
        require("step" not in numbers, "numbers holds 'step'; give the step as the first argument alone")
        line = {"step": step}
        line |= {name: value if type(value) is int else float(value) for name, value in numbers.items()}
        with writing(self._path):
            self._file.write(_to_line(line))
            self._file.flush()
            for name in numbers:
                self._tensorboard.add(step, name, line[name])
        require_there(self._path, self._file.fileno())

    def sync(self) -> None:
        """Return when what was written would survive a crash of the machine."""
        with writing(self._path):
            self._tensorboard.flush()
            os.fsync(self._file.fileno())
        self._tensorboard.require_there()

    def close(self) -> None:
        """Close both files; what was written stays."""
        with writing(self._path):
            try:
                self._file.close()
            finally:
                self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class _EventFile:
    """TensorBoard's event file, written by the caller's own thread.

    tensorboardX's SummaryWriter has a thread for it. Where the disk is full that thread dies, and the next calls wait
    for it for ever.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        """Open a new file; TensorBoard hides earlier files' events of `purge_step` and of all steps after it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        for event in ({"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}):
            self._write(purge_step, **event)

    def add(self, step: int, name: str, number: float) -> None:
        """Write a scalar."""
        self._write(step, summary=scalar(name, number))

    def _write(self, step: int, **event) -> None:
        self._events.write_event(Event(step=step, wall_time=time.time(), **event))

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._events.flush()

    def require_there(self) -> None:
        """Raise RunError if the folder was removed, or emptied."""
        require_there(next(self._folder.glob("events*"), self._folder / "events*"))

    def close(self) -> None:
        """Flush and close."""
        self._events.close()


def _lines_up_to(path: Path, step: int, evaluated: bool) -> list[dict[str, float]]:
    """Return the lines of a run up to the checkpoint of `step`; a crash may have spoilt those after it."""
    kept = itertools.takewhile(lambda parsed: parsed[1] is not None, _parsed_lines(path))
    return [
        line
        for _, line in kept
        if line["step"] < step or (line["step"] == step and (evaluated or "heldout_loss" not in line))
    ]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a JSONL file of metrics, each with an int "step"; [] if there is no file; null becomes nan.

    A last line without its end, which a killed process may leave, is left out.

    Raises:
      ValueError: for any other line that is not a JSON object with a step.
    """
    metrics = []
    for number, (text, line) in enumerate(_parsed_lines(path), start=1):
        got = text[:40].decode(errors="replace")
        require(line is not None, f"{path}:{number}: {got!r} is not a JSON object with a step; remove the line")
        metrics.append(line)
    return metrics


def _parsed_lines(path: Path) -> Iterator[tuple[bytes, dict[str, float] | None]]:
    """Yield each line that has its end, and what it holds: None if that is not a JSON object with a step."""
    if not Path(path).exists():
        return
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # no JSON, or no UTF-8
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            yield text, {name: math.nan if value is None else value for name, value in line.items()}
        else:
            yield text, None


def _to_line(numbers: Mapping[str, float]) -> str:
    return json.dumps({name: value if math.isfinite(value) else None for name, value in numbers.items()}) + "\n"


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
        self._model = config.transformer
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
            pairs = self._model.visible_pairs(document_lengths(rows["segment_ids"]))
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
        """Return (tokens per second, share of the machine's peak) since the last call; None before there is any."""
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


def document_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Return the tokens of each document of packed rows [B,T], in any order of tokens."""
    return np.concatenate([np.unique(row, return_counts=True)[1] for row in segment_ids])
