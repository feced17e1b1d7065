"""The keys of config.json for rotary positions, as a `RopeConfig` and back.

Two generations of keys: `rope_theta` with `rope_scaling`, whose kind is "type" or "rope_type", and `rope_parameters`,
which holds them all (transformers 5).
"""

from collections.abc import Mapping
from typing import Any

from ring_attention.checks import printable, require_field
from ring_attention.models.hf.values import number, whole
from ring_attention.models.rope import RopeConfig

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
DEFAULT_THETA = 10_000.0

_SCALINGS = {
    "default": ("original_max_position_embeddings",),  # which changes nothing
    "linear": ("factor", "original_max_position_embeddings"),  # nor here
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""Kinds of scaling, and the keys that each may have."""

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "finetuned": (True,),  # Yarn-Llama's: a checkpoint that is not is scaled by its length, too
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
}
"""Keys of any kind of scaling that change nothing, with the values that they do so with."""


def rope_from_hf(values: Mapping[str, Any], max_len: int) -> RopeConfig:
    """Translate the rotary keys of a config.json whose max_position_embeddings is `max_len`.

    Raises:
      ConfigError: for a kind or a key that is not implemented, and for keys that contradict each other.
    """
    section, given = _table(values)
    kind = _one_of(given, "rope_type", "type", section) or "default"
    require_field(
        isinstance(kind, str) and kind in _SCALINGS,
        f"{section}.rope_type",
        kind,
        f"is not implemented; known are {', '.join(_SCALINGS)}",
        "take a checkpoint with one of these",
    )
    inner, outer = given.pop("rope_theta", None), values.get("rope_theta")
    agree = inner is None or outer is None or inner == outer
    require_field(agree, f"{section}.rope_theta", inner, f"but rope_theta={outer!r}", "give one of them")
    theta = number({"rope_theta": outer if inner is None else inner}, "rope_theta", DEFAULT_THETA)
    for key, value in given.items():
        harmless = key in _HARMLESS and value in _HARMLESS[key]
        require_field(
            value is None or key in _SCALINGS[kind] or harmless,
            f"{section}.{printable(key)}",
            value,
            f"is not implemented for rope_type={kind!r}",
            "take a checkpoint without it",
        )
    if kind == "default":
        return RopeConfig(theta=theta)
    return RopeConfig(theta=theta, scaling=kind, **_numbers(kind, given, f"{section}.", max_len))


def _table(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The section with the scaling: its name, and its values to take from."""
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    for key, table in (("rope_scaling", old), ("rope_parameters", new)):
        need = "must be an object or null"
        require_field(table is None or isinstance(table, dict), key, table, need, "correct config.json")
    require_field(
        not (old and new) or old == new, "rope_scaling", old, f"but rope_parameters={new!r}", "give one of them"
    )
    return ("rope_scaling", dict(old)) if old else ("rope_parameters", dict(new or {}))


def _one_of(given: dict[str, Any], key: str, older: str, section: str) -> Any:
    """Take out the value that stands under `key` or its older name."""
    value, other = given.pop(key, None), given.pop(older, None)
    agree = value is None or other is None or value == other
    require_field(agree, f"{section}.{key}", value, f"but {section}.{older}={other!r}", "give one of them")
    return other if value is None else value


def _numbers(kind: str, given: dict[str, Any], section: str, max_len: int) -> dict[str, Any]:
    """The fields of RopeConfig that a kind of scaling has."""
    original = whole(given, "original_max_position_embeddings", max_len)
    fields = {"factor": number(given, "factor", within=section)}
    if kind != "linear":
        fields["original_len"] = original
    if kind == "dynamic":
        require_field(
            original == max_len,
            f"{section}original_max_position_embeddings",
            original,
            f"transformers scales from max_position_embeddings={max_len}",
            "set both to the length that the model was trained with",
        )
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            fields[key] = number(given, key, within=section)
    if kind == "yarn":
        require_field(
            given.get("truncate") in (None, True),
            f"{section}truncate",
            given.get("truncate"),
            "only rounded bounds of the ramp are implemented",
            "take a checkpoint without it",
        )
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0), ("attention_factor", 0.0)):
            fields[key] = number(given, key, default, within=section)
    return fields


def rope_to_hf(rope: RopeConfig, max_len: int, *, nested: bool = False) -> dict[str, Any]:
    """The keys for `rope`: all in `rope_parameters` if `nested`, else those that transformers 4 reads too.

    Raises:
      ConfigError: where transformers would scale from another length.
    """
    scaling: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
    if rope.scaling != "none":
        scaling["factor"] = rope.factor
    if rope.scaling == "dynamic":
        require_field(
            rope.original_len == max_len,
            "model.rope.original_len",
            rope.original_len,
            f"transformers scales dynamically from max_position_embeddings={max_len}",
            "use model.rope.scaling=yarn, or another length",
        )
    if rope.scaling in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = rope.original_len
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor:
            scaling["attention_factor"] = rope.attention_factor
    if nested:
        return {"rope_parameters": {"rope_theta": rope.theta, **scaling}}
    return {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "none" else scaling}
