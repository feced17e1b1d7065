"""Signals that ask a run to stop: SIGTERM, where the machine is about to be taken away, and SIGINT, which is Ctrl-C.

Some thirty seconds are left after SIGTERM to write a checkpoint; a person at a terminal waits as long.
"""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import NoReturn

from jax._src import distributed
from jax.experimental import multihost_utils

from ring_attention.training.fault_tolerance.errors import INTERRUPTED, Interrupted, Preempted, exit_with_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_PRESS = 0.5
"""Seconds within which a second SIGINT counts as the first: a terminal and a launcher may both send it."""


class Preemption:
    """Notices SIGTERM and SIGINT, as a context manager around the steps of a run.

    A process that is alone notices them itself, from its first step on; before, there is nothing to save, and a signal
    ends the process as it always does. Several processes must stop after the same step, however few of them got the
    signal: JAX's preemption service, which listens for SIGTERM from `jax.distributed.initialize` on, finds that step;
    SIGINT is handed to it. It counts how often it was asked, from 0: a signal that comes before the first step of a run
    ends it after that one.

    A SIGINT that comes after another signal does not wait for the checkpoint: it ends the process at once.
    """

    def __init__(self):
        self._has_service = distributed.global_state.preemption_sync_manager is not None
        self._asked = 0
        self._first: tuple[int, float] | None = None  # the signal that was noticed first, and when
        self._before: dict[int, object] = {}

    def reached(self) -> bool:
        """Return whether the run must stop now; every process asks after every step."""
        if not self._before:
            ours = SIGNALS[1:] if self._has_service else SIGNALS  # the service has SIGTERM
            heard = [
                number for number in ours if signal.getsignal(number) != signal.SIG_IGN
            ]  # a shell's & ignores some
            self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        if self._has_service:
            self._asked += 1
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._first is not None

    def stop(self, step: int, num_steps: int, where: object) -> NoReturn:
        """Raise what ends the run after `step`, whose checkpoint lies in `where`."""
        by_hand = self._first is not None and self._first[0] == signal.SIGINT
        kind, cause = (Interrupted, "Ctrl-C") if by_hand else (Preempted, "SIGTERM")
        raise kind(
            f"Stopped by {cause} after step {step} of {num_steps}; it is in {where}, and the same command goes on from "
            "there."
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            if number == signal.SIGINT and self._has_service:
                os.kill(os.getpid(), signal.SIGTERM)
        elif number == signal.SIGINT and (self._first[0] != number or now - self._first[1] > SAME_PRESS):
            exit_with_line(
                INTERRUPTED, "Interrupted before the checkpoint was written; the one before it, if any, stays."
            )

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
