"""How a run ends other than by being done: each way has its exit status, and its message is one line."""

import errno
import os
import sys
from typing import NoReturn

from ring_attention.checks import ConfigError, one_line, printable

FINISHED, FAILED, MISTAKE, INTERRUPTED, PREEMPTED = 0, 1, 2, 130, 143
"""Exit statuses. A scheduler should start a run again after FAILED and PREEMPTED (128 + SIGTERM; 0 would tell it that
the run is done), but not after MISTAKE: the same flags would be refused again."""

ERROR = "train.py: error: "
"""What a line begins with that says why a run has failed."""


class RunError(Exception):
    """The run cannot go on, through no fault of its config: what happened, what is kept, what to do."""


class Preempted(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop, and everything up to now is in a checkpoint."""


class Interrupted(Preempted):
    """The run was asked to stop by Ctrl-C, and everything up to now is in a checkpoint."""


def is_expected(error: BaseException) -> bool:
    """Return whether the line of `exit_status_and_line` says all; any other error needs its traceback."""
    of_a_file = isinstance(error, OSError) and (error.errno == errno.ENOSPC or error.filename is not None)
    return of_a_file or isinstance(error, (ConfigError, RunError, Preempted, KeyboardInterrupt))


def exit_status_and_line(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the line for what ended a run."""
    match error:
        case ConfigError():
            return MISTAKE, f"{ERROR}{error}"
        case RunError():
            return FAILED, f"{ERROR}{error}"
        case Interrupted():
            return INTERRUPTED, str(error)
        case Preempted():
            return PREEMPTED, str(error)
        case KeyboardInterrupt():
            return INTERRUPTED, "Interrupted. The same command goes on from the newest checkpoint, if there is one."
        case OSError(errno=errno.ENOSPC):
            where = f" ({error.filename})" if error.filename else ""
            return FAILED, f"{ERROR}the disk is full{where}; make room, and start the run again"
        case OSError(filename=str() | os.PathLike() as file, strerror=str() as reason):
            return FAILED, f"{ERROR}{printable(str(file))}: {reason}; mend it, and start the run again"
    return FAILED, f"{ERROR}{type(error).__name__}: {one_line(error)[:300]}"


def exit_now(status: int) -> NoReturn:
    """End this process without waiting for the others, as the end of the interpreter would where there are any."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_with_line(status: int, line: str) -> NoReturn:
    """Print a line to stderr and `exit_now`, from a thread or a handler of a signal."""
    os.write(2, f"{line}\n".encode())  # a print that was interrupted holds the lock of sys.stderr
    try:
        exit_now(status)
    finally:
        os._exit(status)
