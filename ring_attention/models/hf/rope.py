"""The keys of config.json for rotary positions, as a `RopeConfig` and back.

Two generations of keys: `rope_theta` with `rope_scaling`, whose kind is "type" or "rope_type", and `rope_parameters`,
which holds them all (transformers 5).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ring_attention.checks import printable, require_field
from ring_attention.models.hf.values import number, numbers, whole
from ring_attention.models.rope import RopeConfig

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
DEFAULT_THETA = 10_000.0

_ORIGINAL = "original_max_position_embeddings"
_YARN = "factor attention_factor beta_fast beta_slow truncate mscale mscale_all_dim"
_SCALINGS = {
    "default": (_ORIGINAL,),  # which changes nothing
    "linear": ("factor", _ORIGINAL),  # nor here
    "dynamic": ("factor", _ORIGINAL),
    "yarn": (_ORIGINAL, *_YARN.split()),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}
"""Kinds of scaling, and the keys that each may have."""

_OLDER_NAMES = {"su": "longrope"}

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "finetuned": (True,),  # Yarn-Llama's: a checkpoint that is not is scaled by its length, too
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
}
"""Keys of any kind of scaling that change nothing, with the values that they do so with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeFacts:
    """What the class of a family makes of the rotary keys.

    Attributes:
      scalings: kinds that it takes.
      partial: it reads partial_rotary_factor.
      query_growth: it reads llama_4_scaling_beta.
    """

    scalings: tuple[str, ...] = tuple(_SCALINGS)
    partial: bool = False
    query_growth: bool = False

    @property
    def inner_keys(self) -> tuple[str, ...]:
        """Further keys of the section with the scaling."""
        partial = ("partial_rotary_factor",) if self.partial else ()
        return partial + (("llama_4_scaling_beta", "max_position_embeddings") if self.query_growth else ())

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of config.json that are read."""
        return ROPE_KEYS + (("partial_rotary_factor",) if self.partial else ())


PLAIN = RopeFacts()


def rope_from_hf(
    values: Mapping[str, Any], max_len: int, default_theta: float = DEFAULT_THETA, *, facts: RopeFacts = PLAIN
) -> RopeConfig:
    """Translate the rotary keys of a config.json whose max_position_embeddings is `max_len`.

    Raises:
      ConfigError: for a kind or a key that is not implemented, and for keys that contradict each other.
    """
    section, given = _table(values)
    kind = _one_of(given, "rope_type", "type", section) or "default"
    kind = _OLDER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    require_field(
        isinstance(kind, str) and kind in facts.scalings,
        f"{section}.rope_type",
        kind,
        f"is not implemented; known are {', '.join(facts.scalings)}",
        "take a checkpoint with one of these",
    )
    theta = number({"rope_theta": _outer_too(given, "rope_theta", values, section)}, "rope_theta", default_theta)
    if kind in ("yarn", "llama3", "longrope"):
        given[_ORIGINAL] = _outer_too(given, _ORIGINAL, values, section)
    for key, value in given.items():
        harmless = key in _HARMLESS and value in _HARMLESS[key]
        require_field(
            value is None or key in _SCALINGS[kind] or key in facts.inner_keys or harmless,
            f"{section}.{printable(key)}",
            value,
            f"is not implemented for rope_type={kind!r}",
            "take a checkpoint without it",
        )
    fields: dict[str, Any] = {"theta": theta}
    if facts.partial:
        inner = given.get("partial_rotary_factor")
        fraction = {"partial_rotary_factor": values.get("partial_rotary_factor") if inner is None else inner}
        fields["fraction"] = number(fraction, "partial_rotary_factor", 1.0)
    if facts.query_growth:
        fields["query_growth"] = number(given, "llama_4_scaling_beta", within=f"{section}.", zero=True)
    if kind == "default":
        return RopeConfig(**fields)
    return RopeConfig(**fields, scaling=kind, **_numbers(kind, given, f"{section}.", max_len))


def _outer_too(given: dict[str, Any], key: str, values: Mapping[str, Any], section: str) -> Any:
    """Take out the value under `key`, which may also stand beside the section."""
    inner, outer = given.pop(key, None), values.get(key)
    agree = inner is None or outer is None or inner == outer
    require_field(agree, f"{section}.{key}", inner, f"but {key}={outer!r}", "give one of them")
    return outer if inner is None else inner


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
    original = whole(given, _ORIGINAL, max_len)
    by_lengths = max(max_len / original, 1.0) if kind == "longrope" or (kind == "yarn" and "factor" in given) else None
    fields: dict[str, Any] = {}
    fields["factor"] = number(given, "factor", *([] if by_lengths is None else [by_lengths]), within=section)
    if kind != "linear":
        fields["original_len"] = original
    if kind == "dynamic":
        require_field(
            original == max_len,
            f"{section}{_ORIGINAL}",
            original,
            f"transformers scales from max_position_embeddings={max_len}",
            "set both to the length that the model was trained with",
        )
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            fields[key] = number(given, key, within=section)
    if kind == "longrope":
        fields["attention_factor"] = number(given, "attention_factor", 0.0, within=section)
        for key in ("short_factor", "long_factor"):
            fields[f"{key}s"] = numbers(given, key, within=section)
    if kind == "yarn":
        truncate = given.get("truncate")
        need, remedy = "must be true or false", "correct config.json"
        require_field(truncate in (None, True, False), f"{section}truncate", truncate, need, remedy)
        fields["truncate"] = truncate is not False
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            fields[key] = number(given, key, default, within=section)
        default = _attention_factor(given, fields["factor"], section)
        fields["attention_factor"] = number(given, "attention_factor", default, within=section)
    return fields


def _attention_factor(given: dict[str, Any], factor: float, section: str) -> float:
    """What mscale and mscale_all_dim say together; 0 unless both are given."""
    scales = [number(given, key, 0.0, within=section, zero=True) for key in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return 0.0
    of_queries, of_all = (0.1 * scale * math.log(factor) + 1 for scale in scales)
    return of_queries / of_all


def rope_to_hf(rope: RopeConfig, max_len: int, *, facts: RopeFacts = PLAIN, nested: bool = False) -> dict[str, Any]:
    """The keys for `rope`: all in `rope_parameters` if `nested`, else those that transformers 4 reads too.

    Raises:
      ConfigError: where transformers would scale from another length, or the family cannot say it.
    """
    kind = "default" if rope.scaling == "none" else rope.scaling
    known = f"models of this family know {', '.join(facts.scalings)}"
    require_field(kind in facts.scalings, "model.rope.scaling", rope.scaling, known, "use one of these")
    for name, plain, can in (("fraction", 1.0, facts.partial), ("query_growth", 0.0, facts.query_growth)):
        value, need = getattr(rope, name), "models of this family have none such"
        require_field(can or value == plain, f"model.rope.{name}", value, need, f"use {plain:g}")
    scaling: dict[str, Any] = {"rope_type": kind} | _scaling_to_hf(rope, max_len)
    if facts.query_growth:
        scaling["llama_4_scaling_beta"] = rope.query_growth
    partial = {"partial_rotary_factor": rope.fraction} if facts.partial else {}
    if nested:
        return {"rope_parameters": {"rope_theta": rope.theta, **partial, **scaling}} | _outer_original(rope)
    if rope.scaling == "longrope":
        scaling["type"] = scaling.pop("rope_type")  # the one that Phi3Config of transformers 4 reads
    scaled = rope.scaling != "none" or facts.query_growth
    return {"rope_theta": rope.theta, "rope_scaling": scaling if scaled else None, **partial} | _outer_original(rope)


def _outer_original(rope: RopeConfig) -> dict[str, Any]:
    return {_ORIGINAL: rope.original_len} if rope.scaling == "longrope" else {}


def _scaling_to_hf(rope: RopeConfig, max_len: int) -> dict[str, Any]:
    """The keys of a scaling's own numbers."""
    scaling: dict[str, Any] = {}
    if rope.scaling != "none" and not (
        rope.scaling == "longrope" and rope.factor == max(max_len / rope.original_len, 1)
    ):
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
        scaling[_ORIGINAL] = rope.original_len
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "longrope":
        scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        scaling |= {} if rope.truncate else {"truncate": False}
    if rope.scaling in ("yarn", "longrope") and rope.attention_factor:
        scaling["attention_factor"] = rope.attention_factor
    return scaling
