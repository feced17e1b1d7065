"""Values of a config.json, each checked to be what its key needs."""

import sys
from collections.abc import Mapping
from typing import Any

from ring_attention.checks import is_whole, require_field

MOST = 2**31 - 1
"""The largest whole number: an array's axes and positions are no longer."""

_REQUIRED = object()
_REMEDY = "correct config.json"


def whole(values: Mapping[str, Any], key: str, default: Any = _REQUIRED, *, most: int = MOST) -> int:
    """The positive whole number under `key`, at most `most`, or `default` where the key is absent or null."""
    value = values.get(key)
    if value is None:
        require_field(
            default is not _REQUIRED, key, value, "is missing", "give config.json the size that the model has"
        )
        return default
    require_field(is_whole(value, 1), key, value, "must be a positive whole number", _REMEDY)
    require_field(value <= most, key, value, f"must be at most {most:,}", _REMEDY)
    return value


def number(values: Mapping[str, Any], key: str, default: Any = _REQUIRED, *, within: str = "") -> float:
    """The positive number under `key`, or `default` where the key is absent or null; `within` names its section."""
    value = values.get(key)
    if value is None:
        require_field(default is not _REQUIRED, within + key, value, "is missing", _REMEDY)
        return default
    fit = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
    require_field(fit, within + key, value, "must be a positive number", _REMEDY)
    return float(value)


def flag(values: Mapping[str, Any], key: str) -> bool:
    """The truth value under `key`; False where it is absent or null."""
    value = values.get(key)
    require_field(value is None or isinstance(value, bool), key, value, "must be true or false", _REMEDY)
    return bool(value)
