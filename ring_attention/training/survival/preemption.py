"""SIGTERM: the machine is about to be taken away, and some thirty seconds are left to write a checkpoint."""

import signal
from types import FrameType, TracebackType

from jax._src import distributed
from jax.experimental import multihost_utils


class Preemption:
    """Notices SIGTERM, as a context manager around the steps of a run.

    A process that is alone notices it itself, from its first step on; before, there is nothing to save, and the signal
    ends the process as it always does. Several processes must stop after the same step, however few of them got the
    signal: JAX's preemption service, which listens from `jax.distributed.initialize` on, finds that step. It counts how
    often it was asked, from 0: a signal that comes before the first step of a run ends it after that one.
    """

    def __init__(self):
        self._has_service = distributed.global_state.preemption_sync_manager is not None
        self._asked = 0
        self._signalled = False
        self._before = None

    def reached(self) -> bool:
        """Whether the run must stop now; every process asks after every step."""
        if self._has_service:
            self._asked += 1
            return multihost_utils.reached_preemption_sync_point(self._asked)
        if self._before is None:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self._signalled

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
