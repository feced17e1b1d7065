"""One run, one folder: a lock that the system lets go of when its process ends, however it ends."""

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from ring_attention.checks import ConfigError

LEASE_SECONDS = 150
"""An NFS server keeps the lock of a machine that died for about 90 s; a restart waits for that, and then some."""


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
    """(process id, host, time) of who holds the lock, "?" where the file does not say."""
    try:
        words = json.loads(path.read_text())
        return str(words["pid"]), str(words["host"]), str(words["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return "?", "?", "?"
