"""The kinds of a model's layers as keys of config.json say them, layer by layer, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ring_attention.checks import require_field
from ring_attention.models.hf.values import flag, whole
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.rope import RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"
NO_POSITIONS = RopeConfig(theta=10_000.0, fraction=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTypes:
    """Which layers of a family have the window of `sliding_window`, and which rotary embedding.

    Attributes:
      window: whether there are windows at all.
      switch: a key that must be true for them.
      listed: whether `layer_types`, the type of each layer, is read.
      first: a key with the number of the first layer with a window, where the types are not listed; "" for 0.
      period: where they are not listed, each layer whose number is one less than a multiple of this sees all; 0: none.
      period_key: a key that says the period.
      rope_by_type: whether layers with and without a window have rotary embeddings of their own.
      thetas: the bases of layers that see all and of those with a window, where no key says them.
      local_theta: the older key of the base of those with a window.
      full_without_positions: whether layers that see all have no rotary embedding.
      positions: a key that lists for each layer whether it has a rotary embedding, 1 or 0; where the types of layers
        are not listed, those without have the window.
      positions_period: a key that says the same where they are not listed: each layer whose number is one less than a
        multiple of it, by default 4, has none.
    """

    window: bool = False
    switch: str = ""
    listed: bool = False
    first: str = ""
    period: int = 0
    period_key: str = ""
    rope_by_type: bool = False
    thetas: tuple[float, float] = (10_000.0, 10_000.0)
    local_theta: str = ""
    full_without_positions: bool = False
    positions: str = ""
    positions_period: str = ""

    @property
    def keys(self) -> frozenset[str]:
        """The keys that are read."""
        always = {"sliding_window", "use_sliding_window", "layer_types", "max_window_layers"}
        own = {self.switch, self.first, self.period_key, self.local_theta, self.positions, self.positions_period}
        return frozenset(always | own - {""})


def windows_from_hf(values: Mapping[str, Any], rule: LayerTypes, layers: int) -> list[int]:
    """The window of each layer, 0 for none.

    Raises:
      ConfigError: for types that are not known, and keys that contradict each other.
    """
    if not rule.window:
        size, on = values.get("sliding_window"), flag(values, "use_sliding_window")
        require_field(not size and not on, "sliding_window", size, "this family has none", "set it to null")
    size = whole(values, "sliding_window", 0) if rule.window else 0
    if rule.switch and not flag(values, rule.switch):
        size = 0
    kinds = values.get("layer_types")
    if kinds is None:
        first = whole(values, rule.first) if rule.first and values.get(rule.first) else 0
        period = whole(values, rule.period_key, rule.period) if rule.period_key else rule.period
        turned = _listed_positions(values, rule, layers) if rule.positions else [False] * layers
        sees_all = lambda i: i < first or turned[i] or bool(period) and (i + 1) % period == 0  # noqa: E731
        require_field(
            size > 0 or not period, "sliding_window", values.get("sliding_window"), "is missing", "give its size"
        )
        return [0 if sees_all(layer) else size for layer in range(layers)]
    right = isinstance(kinds, list) and len(kinds) == layers
    require_field(right, "layer_types", kinds, f"must name the kind of each of {layers} layers", "correct config.json")
    other = next((kind for kind in kinds if kind not in (FULL, SLIDING)), None)
    need = f"only {FULL} and {SLIDING} are implemented"
    require_field(other is None, "layer_types", other, need, "take a checkpoint without others")
    need, remedy = "sliding layers without sliding_window", "give its size"
    require_field(SLIDING not in kinds or size > 0, "layer_types", kinds, need, remedy)
    windows = [size if kind == SLIDING else 0 for kind in kinds]
    if not rule.listed:
        unlisted = windows_from_hf({**values, "layer_types": None}, rule, layers)
        need = "is not read in this family, whose layers are alike"
        require_field(windows == unlisted, "layer_types", kinds, need, "take it out of config.json")
    return windows


def positions_from_hf(values: Mapping[str, Any], rule: LayerTypes, windows: Sequence[int]) -> list[bool]:
    """Whether each layer has a rotary embedding."""
    if rule.full_without_positions:
        return [bool(window) for window in windows]
    return _listed_positions(values, rule, len(windows)) if rule.positions else [True] * len(windows)


def _listed_positions(values: Mapping[str, Any], rule: LayerTypes, layers: int) -> list[bool]:
    listed = values.get(rule.positions)
    if listed is None:
        period = whole(values, rule.positions_period, 4)
        return [(layer + 1) % period != 0 for layer in range(layers)]
    fits = isinstance(listed, list) and len(listed) >= layers and all(each in (0, 1) for each in listed)
    need = f"must be 1 or 0 for each of {layers} layers"
    require_field(fits, rule.positions, listed, need, "correct config.json")
    return [bool(each) for each in listed[:layers]]


def positions_to_hf(kinds: Sequence[LayerKind], rule: LayerTypes) -> dict[str, Any]:
    """The keys for which layers have a rotary embedding, as far as the family has one."""
    return {rule.positions: [int(bool(kind.rope and kind.rope.fraction)) for kind in kinds]} if rule.positions else {}


def windows_to_hf(windows: Sequence[int], rule: LayerTypes) -> dict[str, Any]:
    """The keys for the window of each layer, as far as the family can say it."""
    if not rule.window:
        return {}
    size = max(windows)
    if not size:
        if rule.switch:
            return {rule.switch: False}
        listed = {"layer_types": [FULL] * len(windows)} if rule.listed else {}
        return {"sliding_window": None if not rule.period else 4096, **listed}
    keys: dict[str, Any] = {rule.switch: True} if rule.switch else {}
    keys["sliding_window"] = size
    first = next(i for i, window in enumerate(windows) if window)
    if rule.first and all(windows[first:]):
        return keys | {rule.first: first}
    if rule.listed:
        keys["layer_types"] = [SLIDING if window else FULL for window in windows]
    return keys


def kinds_of(
    windows: Sequence[int], positions: Sequence[bool], ropes: tuple[RopeConfig, RopeConfig]
) -> list[LayerKind]:
    """The kind of each layer; `ropes` are those of layers without and with a window, `positions` says who has one."""
    each = zip(windows, positions, strict=True)
    return [LayerKind(window=window, rope=ropes[bool(window)] if turned else NO_POSITIONS) for window, turned in each]


def reduced(kinds: Sequence[LayerKind]) -> tuple[LayerKind, tuple[LayerKind, ...]]:
    """What all layers have, and the smallest period of what they have beside it; none where all are alike.

    Where they differ, all have no window, and the rotary embedding of the layers that see all, if it has positions.
    """
    if len(set(kinds)) == 1:
        return kinds[0], ()
    widest = sorted(set(kinds), key=lambda kind: (kind.rope.fraction == 0, kind.window or 0))[0]
    of_all = dataclasses.replace(widest, window=0)
    fields = [field.name for field in dataclasses.fields(LayerKind)]
    open_kinds = [
        LayerKind(**{f: getattr(kind, f) for f in fields if getattr(kind, f) != getattr(of_all, f)}) for kind in kinds
    ]
    period = next(p for p in range(1, len(kinds) + 1) if all(k == open_kinds[i % p] for i, k in enumerate(open_kinds)))
    return of_all, tuple(open_kinds[:period])
