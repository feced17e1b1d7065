"""A trainer in a process of its own, so that neither library's threads, memory or settings touch the other's."""

import dataclasses
import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from ring_attention.training.config import TrainConfig
from ring_attention.training.fault_tolerance.errors import RunError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds, CPU seconds and loss of one step.

    Attributes:
      seconds: on the wall.
      cpu_seconds: that all threads of the process computed.
      loss: before its update, nats per target.
    """

    seconds: float
    cpu_seconds: float
    loss: float


class TrainerProcess:
    """`trainers.make_trainer` elsewhere. A context manager; the process ends with it.

    Raises RunError, from every method, with what went wrong in the process.
    """

    def __init__(self, kind: str, config: TrainConfig, weights: Path):
        self.kind = kind
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, config, weights), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def step(self) -> Step:
        """Take a step with a clock."""
        return self._ask("step")

    def parts(self) -> dict[str, float]:
        """Take a step; return its seconds by part."""
        return self._ask("parts")

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._pipe.close()
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, request: str):
        try:
            self._pipe.send(request)
        except BrokenPipeError as error:
            raise RunError(f"{self.kind}: its process has ended") from error
        return self._receive()

    def _receive(self):
        try:
            done, answer = self._pipe.recv()
        except EOFError as error:
            raise RunError(
                f"{self.kind}: its process ended without a word; is there memory for all of them?"
            ) from error
        if not done:
            raise RunError(f"{self.kind}: {answer}")
        return answer


def _serve(pipe: Connection, kind: str, config: TrainConfig, weights: Path) -> None:
    from scripts.benchmarks.trainers import make_trainer  # what spawns need not have JAX

    def timed_step() -> Step:
        start, cpu = time.perf_counter(), time.process_time()
        loss = trainer.run()
        return Step(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, loss=loss)

    try:
        trainer = make_trainer(kind, config, weights)
        pipe.send((True, None))
        while True:
            try:
                request = pipe.recv()
            except EOFError:
                return
            pipe.send((True, timed_step() if request == "step" else trainer.parts()))
    except Exception:  # whatever it is, the other side must hear of it
        pipe.send((False, traceback.format_exc()))
