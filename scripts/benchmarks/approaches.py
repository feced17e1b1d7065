"""The approaches to attention that are compared, and what is measured of each."""

import dataclasses

import numpy as np

from ring_attention.parallel.strategies import find_strategy
from ring_attention.parallel.ulysses import even_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Approach:
    """One row.

    Attributes:
      label: what the comparison calls it.
      strategy, options: of `context_attention`.
      window: whether it runs with --window.
    """

    label: str
    strategy: str
    options: dict = dataclasses.field(default_factory=dict)
    window: bool = False

    def options_for(self, devices: int) -> dict:
        """USP divides the devices as evenly as it can, since with Ulysses or a ring alone it would be those."""
        if self.strategy == "usp":
            return dict(ulysses_size=even_size(devices))
        return self.options

    @property
    def claim(self) -> tuple[str, str]:
        """(memory, communication) as commonly claimed; "-" where nobody does."""
        return find_strategy(self.strategy).claim or ("-", "-")


APPROACHES = (
    Approach(label="single device", strategy="single_device"),
    Approach(label="naive broadcast", strategy="all_gather", options=dict(head_groups=1)),
    Approach(label="all-gather by heads", strategy="all_gather"),
    Approach(label="sparse", strategy="sparse"),
    Approach(label="sliding window", strategy="sliding_window", window=True),
    Approach(label="ring self-attention", strategy="ring_self_attention"),
    Approach(label="ring", strategy="ring"),
    Approach(label="Ulysses", strategy="ulysses"),
    Approach(label="USP", strategy="usp"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Memory and bytes of a forward pass on one device, as compiled."""

    memory: int  # temporary bytes
    sent: int  # bytes


@dataclasses.dataclass(kw_only=True)
class Row:
    """All measurements of one approach.

    Attributes:
      by_length: tokens -> Cost, at the most devices.
      by_devices: devices -> Cost, at the most tokens.
      training: Cost of forward and backward together, at the most of both.
      error: of out, dq, dk and dv the largest, in units of a dense implementation's in the same dtype.
      from_full: relative difference of out from full causal attention.
      leak: largest change of an output when later tokens change.
      seconds: forward and backward.
    """

    by_length: dict[int, Cost]
    by_devices: dict[int, Cost]
    training: Cost | None = None
    error: float = 0.0
    from_full: float = 0.0
    leak: float = 0.0
    seconds: float = 0.0

    @property
    def forward(self) -> Cost:
        """At the most tokens and devices."""
        return list(self.by_length.values())[-1]

    def exponent(self, over: str, of: str) -> float | None:
        """Return the power of tokens or devices with which memory or bytes grow; None where there is nothing to fit."""
        costs = getattr(self, f"by_{over}")
        points = [(x, getattr(cost, of)) for x, cost in costs.items() if getattr(cost, of) > 0]
        return fitted_exponent(points) if len(points) > 1 else None


def fitted_exponent(points: list[tuple[int, int]]) -> float:
    """Return the slope of a straight line through the logarithms, by least squares."""
    x, y = np.log(np.array(points, float)).T
    return float(np.polyfit(x, y, 1)[0])
