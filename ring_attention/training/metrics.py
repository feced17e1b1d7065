"""Numbers of a run over its steps: a JSONL file for programs, TensorBoard for people."""

import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from ring_attention.checks import require
from ring_attention.training.survival.disk import require_there, writing


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
    """The lines of a run up to the checkpoint of `step`; a machine that crashed may have spoilt those after it."""
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
