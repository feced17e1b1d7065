"""Which strategy is the fastest that fits, over tokens per device and bandwidth, for one model on one kind of chip."""

import dataclasses

import numpy as np

from ring_attention.hardware.chips import GB
from ring_attention.planning.plan import Candidate, candidates_of, recommend, strategies_of
from ring_attention.planning.shares import Share

NONE = "none fits"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyMap:
    """The family of strategies that wins, for each length of a shard and each bandwidth.

    Attributes:
      tokens: of a device, [x].
      bandwidths: of a link one way, bytes a second, [y].
      families: their names; a strategy that is a special case of another counts as that one.
      best: [y, x], numbers of families.
      candidates: [y][x], all strategies there, the fastest first.
    """

    tokens: np.ndarray
    bandwidths: np.ndarray
    families: tuple[str, ...]
    best: np.ndarray
    candidates: list[list[list[Candidate]]]


def map_strategies(share: Share, columns: int = 15, rows: int = 13) -> StrategyMap:
    """Plan the same model and mesh with other contexts and links; networks between hosts change with the links.

    The share's own tokens and link are among them.
    """
    most = max(8 * share.tokens, 4096)
    tokens = np.unique(np.geomspace(512, most, columns).astype(int) // 128 * 128)
    bandwidths = np.geomspace(5 * GB, 900 * GB, rows)
    for values, own in ((tokens, share.tokens), (bandwidths, share.topology.chip.link)):
        values[np.abs(np.log(values / own)).argmin()] = own
    best = np.zeros((rows, len(tokens)), int)
    strategies = strategies_of(share)  # other contexts of the same mesh run the same ones
    families = (NONE, *dict.fromkeys(strategy.family for strategy in strategies))
    candidates = [[candidates_of(_other(share, int(t), b), strategies) for t in tokens] for b in bandwidths]
    for y, row in enumerate(candidates):
        for x, priced in enumerate(row):
            recommended, _ = recommend(priced)
            best[y, x] = families.index(recommended.strategy.family if recommended else NONE)
    return StrategyMap(tokens=tokens, bandwidths=bandwidths, families=families, best=best, candidates=candidates)


def _other(share: Share, tokens: int, bandwidth: float) -> Share:
    config = dataclasses.replace(share.config, seq_len=tokens * share.ring)
    factor = bandwidth / share.topology.chip.link
    chip = dataclasses.replace(share.topology.chip, link=bandwidth, network=share.topology.chip.network * factor)
    return dataclasses.replace(share, config=config, topology=dataclasses.replace(share.topology, chip=chip))
