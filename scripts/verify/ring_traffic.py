"""What travels around a ring: the fewest transfers and bytes that a case needs, and those that our code asks for."""

import dataclasses
import itertools

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

import ring_attention as ra

PROGRAMS = ("forward", "backward", "forward+backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A program that one row of the table compiles.

    Attributes:
      program: one of PROGRAMS.
      ring_size: devices.
      layout: of the sequence.
      window: as in `ring_attention`, None for none.
      duplex, unroll: as in `ring_attention`.
      shard: tokens of one device.
    """

    ring_size: int
    layout: str
    window: int | None
    shard: int
    duplex: bool
    program: str
    unroll: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes and `ppermute`s that a traced program sends from one device, loops multiplied out.

    Attributes:
      permutes: how many run.
      bytes: how much they send.
      bytes_back: how much of it goes to devices before this one, against the direction of the ring.
    """

    permutes: int = 0
    bytes: int = 0
    bytes_back: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Both."""
        return Traffic(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: int) -> "Traffic":
        """Return this traffic several times."""
        return Traffic(**{name: value * times for name, value in vars(self).items()})


def fewest_hops(case: Case) -> np.ndarray:
    """[2, t]: how far each token of a shard has to go around the ring and how far the other way, the fewest in all.

    Found token by token from who sees whom. The same program runs on every device, so a token of one shard goes as far
    as that of any shard has to. With duplex, tokens of the second half go the other way round where that is as far.
    """
    P, t = case.ring_size, case.shard
    layout = ra.SequenceLayout(case.layout, P)
    positions = layout.positions(P * t).reshape(P, t)
    window = case.window or P * t
    needed = np.zeros((P, t), bool)  # [s, token]: does any device need it of the device s places before?
    for source, device in itertools.permutations(range(P), 2):
        seen_by = np.sort(positions[device])
        first = np.searchsorted(seen_by, positions[source])  # the first query that is not before the key
        within = seen_by[np.minimum(first, t - 1)] < positions[source] + window
        needed[(device - source) % P] |= (first < t) & within
    ways = np.zeros((2, t), int)
    for token in range(t):
        shifts = np.flatnonzero(needed[:, token])
        turned = case.duplex and token >= t // 2
        forth, back = [0, *shifts], [*(P - shifts), 0]
        ways[:, token] = min(zip(forth, back, strict=True), key=lambda way: (sum(way), way[0 if turned else 1]))
    return ways


def bounds(case: Case, kv_bytes: int, gradient_bytes: int) -> tuple[int, int]:
    """(transfers, bytes) that a device cannot do without.

    Forward: K and V of each token as far as they are needed, P-1 hops without a window. Backward: the same again, and
    dK and dV, in float32, as often: on the last device they are sent home instead of on, and at home they never left.

    Args:
      case: what travels.
      kv_bytes: of the K of one token of all heads, which is that of its V.
      gradient_bytes: the same of dK.
    """
    ways = fewest_hops(case)
    permutes, hops = 2 * int(ways.max(1).sum()), 2 * int(ways.sum())
    passes = {"forward": 1, "backward": 1, "forward+backward": 2}[case.program]
    gradients = int(case.program != "forward")
    return permutes * (passes + gradients), hops * (passes * kv_bytes + gradients * gradient_bytes)


def written(jaxpr: Jaxpr | ClosedJaxpr) -> Traffic:
    """Return the traffic that our code asks for."""
    total = Traffic()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "ppermute":
            (source, target), *_ = pairs = eqn.params["perm"]
            size = sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.invars)
            back = (target - source) % len(pairs) > len(pairs) / 2
            total += Traffic(permutes=len(eqn.invars), bytes=size, bytes_back=size * back)
        is_jaxpr = lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))  # noqa: E731
        inner = [x for x in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(x)]
        total += sum(map(written, inner), Traffic()) * eqn.params.get("length", 1)
    return total
