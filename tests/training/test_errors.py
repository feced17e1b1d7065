"""What ended a run decides its exit status, by which a scheduler knows whether to start it again, and its last line."""

import errno
import os

import jax
import pytest

from ring_attention.checks import ConfigError
from ring_attention.training.fault_tolerance.errors import (
    Interrupted,
    Preempted,
    RunError,
    exit_status_and_line,
    is_expected,
)

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/metrics.jsonl")
EXPECTED = [
    (ConfigError("seed=x: must be whole"), 2, "train.py: error: seed=x: must be whole"),
    (RunError("no checkpoint"), 1, "train.py: error: no checkpoint"),
    (Preempted("Stopped after step 3."), 143, "Stopped after step 3."),
    (Interrupted("Stopped after step 3."), 130, "Stopped after step 3."),
    (KeyboardInterrupt(), 130, "Interrupted. The same command goes on from the newest checkpoint, if there is one."),
    (FULL, 1, "train.py: error: the disk is full (/runs/a/metrics.jsonl); make room, and start the run again"),
    (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        1,
        "train.py: error: the disk is full; make room, and start the run again",
    ),
    (
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/runs/a/loss\n.png"),
        1,
        "train.py: error: '/runs/a/loss\\n.png': No such file or directory; mend it, and start the run again",
    ),
]
UNEXPECTED = [
    (ValueError("two\nlines"), "train.py: error: ValueError: two lines"),
    (OSError(errno.EIO, "Input/output error"), "train.py: error: OSError: [Errno 5] Input/output error"),
    (jax.errors.JaxRuntimeError("x" * 999), f"train.py: error: JaxRuntimeError: {'x' * 300}"),
]


def kind_of(value):
    return type(value).__name__ if isinstance(value, BaseException) else ""


@pytest.mark.parametrize(("error", "status", "line"), EXPECTED, ids=kind_of)
def test_exit_status_and_line_of_expected_errors(error, status, line):
    assert is_expected(error)
    assert exit_status_and_line(error) == (status, line)


@pytest.mark.parametrize(("error", "line"), UNEXPECTED, ids=kind_of)
def test_exit_status_and_line_of_unexpected_errors(error, line):
    assert not is_expected(error)
    assert exit_status_and_line(error) == (1, line)
