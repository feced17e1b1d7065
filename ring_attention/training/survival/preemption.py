"""SIGTERM: the machine is about to be taken away, and some thirty seconds are left to write a checkpoint."""

import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notices SIGTERM, as a context manager around the steps of a run.

    A process that is alone notices it itself, from its first step on; before, there is nothing to save, and the signal
    ends the process as it always does. Several processes must stop after the same step, however few of them got the
    signal: JAX's preemption service, which listens from `jax.distributed.initialize` on, finds that step.
    """

    def __init__(self):
        self._signalled = False
        self._before = None

    def reached(self, step: int) -> bool:
        """Whether the run must stop now, after `step`; every process asks after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
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
