"""What the pod's own compiler says of a config: whether it fits, what it sends, and what hides its transfers."""

import dataclasses
import importlib.metadata
import re
import time

import jax

from ring_attention.checks import ConfigError
from ring_attention.parallel.chips import GiB
from ring_attention.parallel.mesh import TENSOR
from ring_attention.planning.hlo import compiled
from ring_attention.planning.hlo.transfers import AxisTraffic, Transfer, collectives_by_axis, transfers, warnings_of
from ring_attention.planning.pods import pod_devices
from ring_attention.planning.prediction.plan import GRAIN, Plan
from ring_attention.planning.prediction.rates import wires_of
from ring_attention.planning.prediction.topology import Topology
from ring_attention.planning.programs import compile_step
from ring_attention.training.config import TrainConfig

_NEEDED = re.compile(r"required for HLO temporaries \(([\d.]+)([MGT])\)")
_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt")


class DoesNotFitError(ConfigError):
    """The compiler would not compile the step within the chip's memory. `needed` is what it asked for, in bytes."""

    def __init__(self, message: str, needed: float):
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """A training step as it was compiled for a pod.

    Attributes:
      memory: of a device.
      seconds: that compiling took.
      collectives: all of them by kind and mesh axis.
      transfers: the permutes in the program's text, with the time of what stands beside each.
      warnings: what ought not to be there, a line each.
      versions: of the compilers.
    """

    memory: compiled.Memory
    seconds: float
    collectives: list[AxisTraffic]
    transfers: list[Transfer]
    warnings: list[str]
    versions: dict[str, str]


def compile_for(config: TrainConfig, topology: Topology):
    """(compiled step, seconds) for the pod.

    Raises:
      DoesNotFitError: if the compiler refuses for want of memory.
      ConfigError: if the compiler is not installed or the pod cannot run the config.
    """
    devices, start = pod_devices(topology.name), time.monotonic()
    try:
        program = compile_step(config, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = needed_bytes(str(error))
        words = f"{needed / GiB:.1f} GiB" if needed else "more"
        raise DoesNotFitError(
            f"seq_len={config.seq_len}: the compiler for {topology.name} needs {words} for temporaries alone, of "
            f"{topology.chip.memory / GiB:.2f} GiB; shorten it, or set model.remat=full or offload",
            needed or float("inf"),
        ) from error
    return program, time.monotonic() - start


def prove(plan: Plan) -> Proof:
    """Compile the plan's config, and read what the compiler made of it."""
    share = plan.share
    program, seconds = compile_for(share.config, share.topology)
    text, hop = program.as_text(), wires_of(share.topology, share.ring, share.mesh[TENSOR]).hop
    return Proof(
        memory=compiled.memory_of(program),
        seconds=seconds,
        collectives=collectives_by_axis(text, share.mesh),
        transfers=transfers(text, share.topology.chip, share.mesh, bandwidth=hop),
        warnings=warnings_of(text, share),
        versions=versions(),
    )


def longest_compiled(plan: Plan, report) -> int:
    """The longest context that compiles within the chip's memory, to within a sixteenth, in tokens; 0 if none does.

    Begins with the predicted one, so that few compilations are needed.

    Args:
      plan: of the config.
      report: called as report(tokens, bytes of a device, whether that fits) after each compilation.
    """
    share = plan.share
    step = GRAIN * share.ring

    def fits(tokens: int) -> bool:
        config = dataclasses.replace(share.config, seq_len=tokens)
        try:
            memory = compiled.memory_of(compile_for(config, share.topology)[0])
            needed, on_host = memory.total, memory.host
        except DoesNotFitError as error:
            needed, on_host = error.needed, 0
        enough = needed <= share.topology.chip.memory and on_host <= share.topology.chip.host_memory
        report(tokens, needed, enough)
        return enough

    low, high = 0, 0
    tokens = max(plan.longest // step, 1) * step
    while not high or (low and high - low > max(step, low // 16)) or (not low and high > step):
        if fits(tokens):
            low = tokens
        else:
            high = tokens
        if not high:
            tokens = low + max(low // 8 // step, 1) * step
        elif not low:
            tokens = max(high * 7 // 8 // step, 1) * step if high > step else step
        else:
            tokens = (low + high) // 2 // step * step
    return low


def needed_bytes(message: str) -> float | None:
    """What the TPU compiler says it would have needed, in bytes; None if it does not say."""
    match = _NEEDED.search(message)
    return float(match[1]) * _UNITS[match[2]] if match else None


def versions() -> dict[str, str]:
    """Of JAX and of the compilers that are installed."""
    found = {}
    for name in _COMPILERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
