"""Numbers of a run over its steps: a JSONL file for programs, TensorBoard for people."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter

from ring_attention.checks import require


class MetricsWriter:
    """Writes every number twice: as a line of JSON and as a TensorBoard scalar.

    A run that goes on from the checkpoint of step s drops what it had written about later steps, so that in the end the
    file is that of a run that was never interrupted. In a multi-process run only one process makes a writer.
    """

    def __init__(self, metrics_path: Path, tensorboard_dir: Path, *, resume_step: int | None):
        """Open the files.

        Args:
          metrics_path: the JSONL file, made if there is none.
          tensorboard_dir: the folder of TensorBoard's event files.
          resume_step: the step of the checkpoint that the run goes on from; None starts over and keeps nothing.
        """
        kept = (
            [] if resume_step is None else [line for line in read_metrics(metrics_path) if line["step"] <= resume_step]
        )
        partial = metrics_path.with_name(f".{metrics_path.name}.partial")
        partial.write_text("".join(map(_to_line, kept)), encoding="utf-8")
        partial.replace(metrics_path)
        self._file = metrics_path.open("a", encoding="utf-8")
        # TensorBoard hides the earlier events of purge_step and of all steps after it.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=purge_step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write `numbers` (anything that float() takes; ints stay ints) of `step`, and flush the JSONL file.

        JSON has no word for numbers that are not finite; they are written as null.
        """
        require("step" not in numbers, "numbers holds 'step'; give the step as the first argument alone")
        line = {"step": step}
        line |= {name: value if type(value) is int else float(value) for name, value in numbers.items()}
        self._file.write(_to_line(line))
        self._file.flush()
        for name in numbers:
            self._tensorboard.add_scalar(name, line[name], global_step=step)

    def close(self) -> None:
        """Close both files; what was written stays."""
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a JSONL file of metrics, each with an int "step"; [] if there is no file; null becomes nan.

    A last line without its end, which a killed process may leave, is left out.

    Raises:
      ValueError: for any other line that is not a JSON object with a step.
    """
    if not Path(path).exists():
        return []
    *lines, _torn = Path(path).read_text(encoding="utf-8").split("\n")
    metrics = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        valid = isinstance(line, dict) and type(line.get("step")) is int
        require(valid, f"{path}:{number}: {text[:40]!r} is not a JSON object with a step; remove the line")
        metrics.append({name: math.nan if value is None else value for name, value in line.items()})
    return metrics


def _to_line(numbers: Mapping[str, float]) -> str:
    return json.dumps({name: value if math.isfinite(value) else None for name, value in numbers.items()}) + "\n"
