"""How a run ends other than by being done: each way has its exit status, and its message is one line."""

import errno

from ring_attention.checks import ConfigError, one_line

FINISHED, FAILED, MISTAKE, INTERRUPTED, PREEMPTED = 0, 1, 2, 130, 143
"""Exit statuses. A scheduler should start a run again after FAILED and PREEMPTED (128 + SIGTERM; 0 would tell it that
the run is done), but not after MISTAKE: the same flags would be refused again."""

ERROR = "train.py: error: "
"""What a line begins with that says why a run has failed."""


class RunError(Exception):
    """The run cannot go on, through no fault of its config: what happened, what is kept, what to do."""


class Preempted(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop, and everything up to now is in a checkpoint."""


def is_expected(error: BaseException) -> bool:
    """Whether the line of `last_words` says all; a traceback would say more of any other error."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or isinstance(error, (ConfigError, RunError, Preempted, KeyboardInterrupt))


def last_words(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the line for what ended a run."""
    match error:
        case ConfigError():
            return MISTAKE, f"{ERROR}{error}"
        case RunError():
            return FAILED, f"{ERROR}{error}"
        case Preempted():
            return PREEMPTED, str(error)
        case KeyboardInterrupt():
            return INTERRUPTED, "\nInterrupted. The same command goes on from the newest checkpoint."
        case OSError(errno=errno.ENOSPC):
            where = f" ({error.filename})" if error.filename else ""
            return FAILED, f"{ERROR}the disk is full{where}; make room, and start the run again"
    return FAILED, f"{ERROR}{type(error).__name__}: {one_line(error)[:300]}"
