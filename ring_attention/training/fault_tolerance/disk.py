"""The files of a run: whether the disk has room for them, and what is said where they cannot be written any more."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from ring_attention.checks import ConfigError, require_field
from ring_attention.training.fault_tolerance.errors import RunError

_GONE = "start the run again; it goes on from its newest checkpoint, or from its beginning where that is gone, too"

LEASE_SECONDS = 150
"""An NFS server keeps the lock of a machine that died for about 90 s; a restart waits for that, and then some."""


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


class FolderLock:
    """Holds a folder for this process, as a context manager.

    The lock is the system's (`flock`), so a killed run leaves nothing behind that would keep the next one out. The file
    says who holds it. On a shared file system it holds between machines as far as that file system keeps locks: NFS 4,
    Lustre (mounted with flock) and local disks do.
    """

    def __init__(self, folder: Path):
        """Take the lock of `folder`, which exists.

        Raises:
          ConfigError: if another process has it, or the file system keeps no locks.
        """
        self._path = folder / ".lock"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire()
        except BlockingIOError:
            pid, host, since = _owner(self._path)
            os.close(self._file)
            raise ConfigError(
                f"run_dir={str(folder)!r}: is in use by process {pid} on {host} since {since}; wait "
                "for it to end, stop it, or give this run another folder with --config.run_dir=PATH"
            ) from None
        except OSError as error:
            os.close(self._file)
            raise ConfigError(
                f"run_dir={str(folder)!r}: its file system keeps no locks ({error.strerror}), so two runs could "
                "spoil each other there; give a folder elsewhere with --config.run_dir=PATH"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._file, 0)
        os.pwrite(
            self._file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(), 0
        )

    def _acquire(self) -> None:
        """Lock the file. One that another machine holds may be a dead machine's, whose lease has to run out first."""
        end, said = time.monotonic() + LEASE_SECONDS, False
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _, host, _ = _owner(self._path)
                if host == socket.gethostname() or time.monotonic() > end:
                    raise
                if not said:
                    words = f"{self._path} is locked from {host}, which may be gone; waiting {LEASE_SECONDS} s for that"
                    print(words, file=sys.stderr, flush=True)
                    said = True
            time.sleep(1)

    def release(self) -> None:
        """Let go of the folder; the empty file stays, for a lock must not be deleted under those who wait for it."""
        os.ftruncate(self._file, 0)
        os.close(self._file)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()


def _owner(path: Path) -> tuple[str, str, str]:
    """Return (process id, host, time) of who holds the lock, "?" where the file does not say."""
    try:
        words = json.loads(path.read_text())
        return str(words["pid"]), str(words["host"]), str(words["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return "?", "?", "?"
