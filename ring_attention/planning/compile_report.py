"""Has the compiler of a pod compile a config, and reports what fits, what is sent, and what hides the transfers."""

import dataclasses
import importlib.metadata
import re
import time
from collections.abc import Sequence

import jax
from rich.table import Table

from ring_attention.checks import ConfigError
from ring_attention.hardware.chips import GiB
from ring_attention.hardware.pods import pod_devices
from ring_attention.hardware.topology import Topology
from ring_attention.planning.hlo import compiled
from ring_attention.planning.hlo.transfers import AxisTraffic, Transfer, collectives_by_axis, transfers, warnings_of
from ring_attention.planning.plan import GRAIN, Plan
from ring_attention.planning.programs import compile_step
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import ring_wires
from ring_attention.training.config import TrainConfig

_NUMBER = r"([\d.]+)([KMGT]?)"
_NEEDED = (
    re.compile(rf"required for HLO temporaries \({_NUMBER}\)"),
    re.compile(rf"Used {_NUMBER} of [\d.]+[KMGT]?i?B? hbm", re.IGNORECASE),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SMALL = {"vmem": "VMEM", "smem": "SMEM", "shared memory": "shared memory"}
_OF_SMALL = re.compile(rf"\b({'|'.join(_SMALL)})\b", re.IGNORECASE)
_OF_HBM = re.compile(r"\bhbm\b", re.IGNORECASE)
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt")


class DoesNotFitError(ConfigError):
    """The compiler would not compile the step within the chip's memory. `needed` is what it asked for, in bytes."""

    def __init__(self, message: str, needed: float):
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """A training step as it was compiled for a pod.

    Attributes:
      memory: what the step takes of a device.
      seconds: how long compiling took.
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
    """Compile a config's training step for the pod; returns (compiled step, seconds).

    Raises:
      DoesNotFitError: if the compiler refuses for want of the device's memory.
      ConfigError: if the compiler is not installed, the pod cannot run the config, or a kernel's tiles do not
        fit the memory beside the cores (VMEM or SMEM of a TPU, shared memory of a GPU): a shorter context is no help.
    """
    devices, start = pod_devices(topology.name), time.monotonic()
    try:
        program = compile_step(config, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if small := small_memory(str(error)):
            sizes = Share.of(config, topology).attention.blocks
            blocks = ", ".join(f"attention.block_{name}={getattr(sizes, name)}" for name in ("q", "kv", "heads"))
            raise ConfigError(
                f"{blocks}: the compiler for {topology.name} ran out of {small}, not of the device's memory: "
                f"{_excerpt(str(error), small)}; give smaller blocks"
            ) from error
        needed = needed_bytes(str(error))
        words = f"{needed / GiB:.1f} GiB" if needed else "more"
        raise DoesNotFitError(
            f"seq_len={config.seq_len}: the compiler for {topology.name} needs {words} for temporaries alone, of "
            f"{topology.chip.memory / GiB:.2f} GiB; shorten it, or set model.remat=full or offload",
            needed or float("inf"),
        ) from error
    return program, time.monotonic() - start


def make_report(plan: Plan) -> CompileReport:
    """Compile the plan's config, and read what the compiler made of it."""
    share = plan.share
    program, seconds = compile_for(share.config, share.topology)
    text, wires = program.as_text(), ring_wires(share)
    hop = None if wires.kind == "DCN" else wires.hop  # which the hops within a slice do not wait for
    return CompileReport(
        memory=compiled.memory_of(program),
        seconds=seconds,
        collectives=collectives_by_axis(text, share.slice_mesh),
        transfers=transfers(text, share.topology.chip, share.slice_mesh, bandwidth=hop),
        warnings=warnings_of(text, share),
        versions=versions(),
    )


def longest_compiled(plan: Plan, report) -> int:
    """Find the longest context that compiles within the chip's memory, to within a sixteenth, in tokens; 0 if none.

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
    """Read the bytes of HBM that a TPU's compiler would have needed from its message; None if it does not say."""
    match = next(filter(None, (pattern.search(message) for pattern in _NEEDED)), None)
    return float(match[1]) * _UNITS[match[2]] if match else None


def small_memory(message: str) -> str | None:
    """The memory beside a device's cores that a compiler ran out of: VMEM, SMEM or shared memory; None if it was HBM.

    A message is judged by its first mention of a memory: one about HBM may list buffers in others after it.
    """
    small, hbm = _OF_SMALL.search(message), _OF_HBM.search(message)
    if not small or (hbm and hbm.start() < small.start()):
        return None
    return _SMALL[small[1].lower()]


def _excerpt(message: str, word: str) -> str:
    """The line of a compiler's message that names a memory, cut where it is long."""
    lines = (line.strip() for line in message.splitlines())
    return next(line for line in lines if word.lower() in line.lower())[:200]


def versions(packages: Sequence[str] = _COMPILERS) -> dict[str, str]:
    """Look up the versions of those that are installed, by default of JAX and the compilers."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def collectives_table(report: CompileReport) -> Table:
    """Tabulate every collective by kind and mesh axis."""
    table = Table(title="Collectives of the compiled step, of one device")
    for name in ("kind", "axes"):
        table.add_column(name)
    for name in ("in the text", "runs", "GB received", "GB sent"):
        table.add_column(name, justify="right")
    for row in report.collectives:
        runs = "unknown" if row.runs is None else f"{row.runs:,}"
        gigabytes = (f"{size / 1e9:.3f}" for size in (row.bytes, row.sent))
        table.add_row(row.kind, row.axes, str(row.instructions), runs, *gigabytes)
    return table


def transfers_table(report: CompileReport) -> Table:
    """Tabulate every permute: the link's time beside that of what is computed meanwhile, at the chip's peak."""
    table = Table(
        title="Transfers of the ring: the link's time, and what is computed meanwhile at the chip's peak",
        caption="of one run; a device waits for what is exposed; in a chip's practice computing takes longer and "
        "hides more",
    )
    for name in ("pass", "axes"):
        table.add_column(name)
    for name in ("runs", "MB", "link ms", "computing ms", "exposed ms", ""):
        table.add_column(name, justify="right")
    for row in report.transfers:
        verdict = "hidden" if row.hidden else "synchronous" if not row.asynchronous else "exposed"
        times = (f"{x * 1e3:.3f}" for x in (row.link_seconds, row.compute_seconds, row.exposed_seconds))
        runs = "?" if row.runs is None else f"{row.runs:,}"
        style = "" if row.hidden else "red"
        table.add_row(row.phase, row.axes, runs, f"{row.bytes / 1e6:.1f}", *times, verdict, style=style)
    return table


def verdict(report: CompileReport) -> str:
    """Say in one line how many transfers are covered by computing, and what the others cost a step."""
    hidden = sum(row.hidden for row in report.transfers)
    waits = sum(row.exposed_seconds * (row.runs or 1) for row in report.transfers)
    total = len(report.transfers)
    return f"{hidden} of {total} transfers are covered by computing; the others cost {waits * 1e3:.1f} ms of a step"


def as_json(report: CompileReport) -> dict:
    """Convert a report to what JSON can hold."""
    return dataclasses.asdict(report) | {"memory_total": report.memory.total, "verdict": verdict(report)}
