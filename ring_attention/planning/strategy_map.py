"""Which strategy is the fastest that fits, over tokens per device and bandwidth, for one model on one kind of chip."""

import dataclasses

import numpy as np

from ring_attention.hardware.chips import GB
from ring_attention.planning.plan import Candidate, candidates_of, recommend, strategies_of
from ring_attention.planning.shares import Share

FAMILIES = ("ring", "all_gather", "usp", "none fits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyMap:
    """The winners.

    Attributes:
      tokens: of a device, [x].
      bandwidths: of a link one way, bytes a second, [y].
      families: names; Ulysses counts as usp.
      best: [y, x], numbers of families.
    """

    tokens: np.ndarray
    bandwidths: np.ndarray
    families: tuple[str, ...]
    best: np.ndarray


def map_strategies(share: Share, columns: int = 15, rows: int = 13) -> StrategyMap:
    """The same model and mesh with other contexts and other links; networks between hosts change with the links."""
    most = max(8 * share.tokens, 4096)
    tokens = np.unique(np.geomspace(512, most, columns).astype(int) // 128 * 128)
    columns = len(tokens)
    bandwidths = np.geomspace(5 * GB, 900 * GB, rows)
    best = np.zeros((rows, columns), int)
    strategies = strategies_of(share)  # other contexts of the same mesh run the same ones
    for y, bandwidth in enumerate(bandwidths):
        for x, t in enumerate(tokens):
            other = _other(share, int(t), bandwidth)
            recommended, _ = recommend(other, candidates_of(other, strategies))
            best[y, x] = FAMILIES.index(_family(recommended))
    return StrategyMap(tokens=tokens, bandwidths=bandwidths, families=FAMILIES, best=best)


def _family(candidate: Candidate | None) -> str:
    name = candidate.label.split()[0] if candidate else "none fits"
    return "usp" if name == "ulysses" else name


def _other(share: Share, tokens: int, bandwidth: float) -> Share:
    config = dataclasses.replace(share.config, seq_len=tokens * share.ring)
    factor = bandwidth / share.topology.chip.link
    chip = dataclasses.replace(share.topology.chip, link=bandwidth, network=share.topology.chip.network * factor)
    return dataclasses.replace(share, config=config, topology=dataclasses.replace(share.topology, chip=chip))
