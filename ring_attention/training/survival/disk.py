"""The files of a run: whether the disk has room for them, and what is said where they cannot be written any more."""

import contextlib
import errno
import logging
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from ring_attention.checks import require_field
from ring_attention.training.survival.errors import RunError

_GONE = "start the run again; it goes on from its newest checkpoint, or from its beginning where that is gone, too"


def require_room(folder: Path, checkpoint_bytes: int, num_more: int) -> None:
    """Raise ConfigError unless the disk of `folder`, which exists, has room for so many more checkpoints."""
    free, need = shutil.disk_usage(folder).free, checkpoint_bytes * num_more
    require_field(
        free >= need,
        "run_dir",
        str(folder),
        f"its disk has {free / 2**20:,.0f} MiB free, and the run needs {need / 2**20:,.0f} MiB for {num_more} more "
        f"checkpoints of {checkpoint_bytes / 2**20:,.0f} MiB",
        "make room, or give a folder on another disk with --config.run_dir=PATH",
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunError where the file system refuses what the block writes to `path`; a full disk has its own words."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise RunError(
            f"{error.filename or path} can no longer be written ({error.strerror or error}); mend it, and {_GONE}"
        ) from error


def require_there(path: Path, file: int | None = None) -> None:
    """Raise RunError unless `path` still exists and, if `file` is given, is what that descriptor has open.

    A file that was removed can be written to its end, and then nobody finds it.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise RunError(f"{path} was removed while the run goes on; leave its folder alone, and {_GONE}") from None
    if file is not None and not os.path.samestat(found, os.fstat(file)):
        raise RunError(f"{path} was replaced while the run goes on; leave its folder alone, and {_GONE}")


def silence_threads() -> None:
    """Keep what fails in orbax's own threads off the terminal: orbax raises it, too, and `Checkpoints` words it."""
    if getattr(threading.excepthook, "silences_orbax", False):
        return
    of_threads, unraisable = threading.excepthook, sys.unraisablehook

    def thread_excepthook(args):
        if not _is_orbax(args.exc_traceback, args.exc_value):
            of_threads(args)

    def unraisablehook(args):  # of tensorstore's callbacks, where the event loop ended before them
        if not _is_orbax(args.exc_traceback, args.exc_value):
            unraisable(args)

    thread_excepthook.silences_orbax = True
    threading.excepthook, sys.unraisablehook = thread_excepthook, unraisablehook
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def _is_orbax(trace, error: BaseException | None) -> bool:
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    return any(f"{os.sep}orbax{os.sep}" in file for file in files) or str(error) == "Event loop is closed"
