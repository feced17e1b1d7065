"""What a person sees while tensors are read or written."""

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ring_attention.models.hf.loading import Progress as Told


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
