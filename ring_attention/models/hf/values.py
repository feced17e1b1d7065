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


def number(
    values: Mapping[str, Any], key: str, default: Any = _REQUIRED, *, within: str = "", zero: bool = False
) -> float:
    """The positive number under `key`, or `default` where the key is absent or null; `within` names its section.

    With `zero`, it may be that, too.
    """
    value = values.get(key)
    if value is None:
        require_field(default is not _REQUIRED, within + key, value, "is missing", _REMEDY)
        return default
    fit = _is_number(value) and (value > 0 or zero and value == 0)
    require_field(fit, within + key, value, "must be a positive number" + " or 0" * zero, _REMEDY)
    return float(value)


def numbers(values: Mapping[str, Any], key: str, *, within: str = "") -> tuple[float, ...]:
    """The list of positive numbers under `key`."""
    value = values.get(key)
    require_field(value is not None, within + key, value, "is missing", _REMEDY)
    fit = isinstance(value, list) and all(_is_number(each) and each > 0 for each in value)
    require_field(fit, within + key, value, "must be a list of positive numbers", _REMEDY)
    return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def flag(values: Mapping[str, Any], key: str) -> bool:
    """The truth value under `key`; False where it is absent or null."""
    value = values.get(key)
    require_field(value is None or isinstance(value, bool), key, value, "must be true or false", _REMEDY)
    return bool(value)
