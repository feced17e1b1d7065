"""What a person sees meanwhile: one live line on a terminal, a plain line now and then in a log file."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from ring_attention.models.hf.loading import Progress as Told

_WIDE = 100  # columns of a terminal that has room for words beside the numbers


class TrainProgress:
    """Progress of a training loop, as a context manager.

    On a terminal a bar is redrawn in place. Elsewhere (CI, nohup, a pipe) a line is printed every `plain_every` steps
    and after the last one, without control characters.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        start_step: int = 0,
        plain_every: int = 10,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepare; nothing is shown before `with`.

        Args:
          num_steps: steps of the whole run.
          start_step: steps that an earlier process did.
          plain_every: steps between lines where there is no terminal.
          file: the file to write to; standard output by default.
          clock: seconds.
        """
        self._console = Console(file=file)
        self._plain_every, self._num_steps, self._clock = plain_every, num_steps, clock
        self._printed_step = start_step
        self._first: tuple[int, float] | None = None
        self._seconds_left: float | None = None
        self._numbers: dict[str, float] = {}
        self._bar = Progress(
            _Numbers(self._count),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the numbers leave
            _Numbers(lambda _: self._describe()),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=start_step)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        heldout_loss: float | None = None,
        tokens_per_second: float | None = None,
        peak_share: float | None = None,
    ) -> None:
        """Show that `step` steps are done; a number that is left out keeps its last value.

        Args:
          step: steps done since the run began.
          loss, heldout_loss: the losses, in one unit, whichever.
          tokens_per_second: over all devices.
          peak_share: the part of the machine's peak in use, 0 to 1.
        """
        numbers = dict(loss=loss, heldout_loss=heldout_loss, tokens_per_second=tokens_per_second, peak_share=peak_share)
        self._numbers |= {name: number for name, number in numbers.items() if number is not None}
        self._seconds_left = self._estimate(step)
        self._bar.update(self._task, completed=step)
        due = step - self._printed_step >= self._plain_every or step == self._num_steps
        if not self._console.is_terminal and due:
            self._printed_step = step
            self.note(f"step {self._count(step)}  {self._describe()}")

    def note(self, text: str) -> None:
        """Print a line; on a terminal above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _count(self, step: int) -> str:
        return f"{step:{len(str(self._num_steps))}}/{self._num_steps}"

    def _describe(self) -> str:
        """Return the numbers there are, in words where the terminal is wide."""
        wide = self._console.width >= _WIDE or not self._console.is_terminal
        heldout, left = ("held out", " left") if wide else ("held", "")
        formats = {
            "loss": lambda x: f"loss {x:.3f}",
            "heldout_loss": lambda x: f"{heldout} {x:.3f}",
            "tokens_per_second": lambda x: f"{_short(x)} tok/s",
            "peak_share": lambda x: f"{100 * x:.1f}%" + (" of peak" if wide else ""),
        }
        parts = [formats[name](self._numbers[name]) for name in formats if name in self._numbers]
        if self._seconds_left is not None:
            parts.append(_duration(self._seconds_left) + left)
        return "  ".join(parts)

    def _estimate(self, step: int) -> float | None:
        """Return the seconds that the remaining steps take at the mean pace, None while there is no pace."""
        now = self._clock()
        if self._first is None:  # the first step is not counted: its time is mostly compilation
            self._first = (step, now)
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._num_steps - step)

    def __enter__(self) -> "TrainProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()


class _Numbers(ProgressColumn):
    """A column of text that depends on the step."""

    def __init__(self, describe: Callable[[int], str]):
        super().__init__()
        self._describe = describe

    def render(self, task: Task) -> Text:
        return Text(self._describe(int(task.completed)), no_wrap=True)


def _short(number: float) -> str:
    """Return three digits and a unit: 950, 12.3k, 1.2M."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def _duration(seconds: float) -> str:
    """Return h:mm:ss, or days and hours from two days on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours < 48 else f"{hours // 24}d {hours % 24}h"


@contextlib.contextmanager
def tensor_progress(words: str, num_bytes: int) -> Iterator[Told]:
    """Show a bar over `num_bytes` of tensors, and give what is to be told of each."""
    columns = (TextColumn(words), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns)
    task = bar.add_task("", total=num_bytes)

    def tell(name: str, size: int) -> None:
        bar.start()  # with the first tensor: what is wrong before is told without a bar
        bar.advance(task, size)

    try:
        yield tell
    finally:
        bar.stop()
