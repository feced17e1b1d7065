"""Rates that the doctor measured, in place of those that the planner takes for a chip."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ring_attention.checks import ConfigError, shown
from ring_attention.hardware.chips import chip_of
from ring_attention.hardware.reach import KernelRate
from ring_attention.hardware.topology import Topology

SCHEMA = 2
"""Of the doctor's file: raised when a name in it changes its meaning."""

_AGAIN = "run ring-attention doctor again on that chip"


def with_measured(topology: Topology, path: Path) -> Topology:
    """The pod at the rates that a file of the doctor has: of dense layers, of attention, and of a link.

    What was not measured stays as it is in the tables: the link where there was one device, dense layers where the file
    has none.

    Raises:
      ConfigError: for a file that cannot be read, has no rates, or is of another chip.
    """
    report = _read(path)
    kind, chip, flag = report.get("device_kind"), topology.chip, f"--measured={path}"
    got = chip_of(kind) if isinstance(kind, str) else None
    if got is not chip:
        need = f"was measured on {shown(kind)}, but {topology.name} has {chip.name} ({', '.join(chip.kinds)})"
        raise ConfigError(f"{flag}: {need}; plan for the chip that was measured, or leave --measured out")
    rates = report["measured"]
    forward, backward = (_rate(flag, rates, name) for name in ("attention", "attention_backward"))
    if forward is None or backward is None:
        raise ConfigError(f"{flag}: has no rates of attention; see its part rates, and {_AGAIN}")
    matmul, link = (_rate(flag, rates, name) for name in ("matmul", "link"))
    source = f"measured by {path.name}"
    kernel = KernelRate(
        kernel=str(rates.get("kernel")),
        chips=(chip.name,),
        forward=forward / chip.flops,
        backward=backward / chip.flops,
        source=f"{source}, attention with {rates.get('kernel')}",
    )
    reach = topology.reach
    if matmul is not None:
        reach = dataclasses.replace(reach, matmul=matmul / chip.flops, source=f"dense layers {source}; {reach.source}")
    if link is not None:
        reach = dataclasses.replace(reach, link=1.0)
        chip = dataclasses.replace(chip, link=link, sources=chip.sources | {"link": f"{source}, a hop of a ring"})
    return dataclasses.replace(topology, chip=chip, measured=reach, measured_kernel=kernel)


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--measured={path}: {error.strerror}; give a file of ring-attention doctor") from error
    except ValueError as error:
        raise ConfigError(f"--measured={path}: is no JSON, or was cut short; {_AGAIN}") from error
    if not isinstance(report, dict) or not isinstance(report.get("measured"), dict):
        raise ConfigError(f"--measured={path}: is no report of the doctor; give the doctor.json that it wrote")
    if report.get("schema") != SCHEMA:
        got = shown(report.get("schema"))
        raise ConfigError(f"--measured={path}: has schema {got}, need {SCHEMA}; {_AGAIN}")
    return report


def _rate(flag: str, rates: dict[str, Any], name: str) -> float | None:
    rate = rates.get(name)
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if rate is not None and not (number and 0 < rate < math.inf):
        raise ConfigError(f"{flag}: measured.{name}={shown(rate)} is no rate; {_AGAIN}")
    return rate
