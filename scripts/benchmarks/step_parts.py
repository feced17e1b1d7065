"""Time of a training step by part of the model: each operation in a trace belongs to a part of the model.

The parts are the `jax.named_scope`s of the model and the step, which the compiled program carries as metadata. An
operation that the compiler fused of several counts for the part of the last of them.
"""

import collections
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData

from ring_attention.planning.hlo.compiled import KINDS

SCOPES = {
    "projections": "projections and rotary",
    "feedforward": "feed-forward",
    "norm": "norms",
    "embedding": "embedding",
    "loss": "loss",
    "optimizer": "optimizer",
    "weights": "weights and their gradients on the way",
}
FORWARD, BACKWARD = "attention forward", "attention backward"
EXCHANGE, OTHER, REST = "transfers, and waiting for them", "other operations", "between operations"
PARTS = (FORWARD, BACKWARD, *SCOPES.values(), EXCHANGE, OTHER, REST)
"""In the order in which they are shown. REST is what no operation covers: the loops themselves, idle devices."""

_CONTAINERS = ("while", "call", "conditional")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", re.MULTILINE)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def parts_of_program(text: str) -> dict[str, str]:
    """Instruction -> part, from the text of a compiled program; what holds other instructions is left out."""
    parts = {}
    for line in text.splitlines():
        if (found := _INSTRUCTION.match(line)) and not found[2].startswith(_CONTAINERS):
            name = _OP_NAME.search(line)
            parts[found[1]] = _part(found[2], name[1] if name else "")
    return parts


def _part(opcode: str, op_name: str) -> str:
    if opcode.startswith(KINDS):
        return EXCHANGE
    scopes = [scope for scope in re.split(r"[/()]", op_name) if scope in SCOPES or scope == "attention"]
    if not scopes:
        return OTHER
    if scopes[-1] == "attention":
        return BACKWARD if "transpose(" in op_name else FORWARD
    return SCOPES[scopes[-1]]


def measure_parts(run: Callable[[], object], program: str, devices: int) -> dict[str, float]:
    """Part -> seconds of a device in one call of `run`, which sum to the seconds of the call.

    Args:
      run: calls the compiled program once and waits for it.
      program: its text.
      devices: that it runs on, on the CPU of this machine. A device's seconds are the mean over all of them.
    """
    parts, seconds = parts_of_program(program), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            run()
            whole = time.perf_counter() - start
        (trace,) = Path(folder).rglob("*.xplane.pb")
        for plane in ProfileData.from_file(str(trace)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in parts:
                        seconds[parts[event.name]] += event.duration_ns / 1e9 / devices
    seconds[REST] = whole - seconds.total()
    return {part: seconds[part] for part in PARTS}
