"""A `TrainConfig` as plain values and back, with every field's name and type checked."""

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ring_attention.checks import ConfigError, one_line, printable, shown
from ring_attention.training.config import TrainConfig

KIND_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
NO_DEFAULT = object()
"""Stands for the default of a field that has none."""

_INT64_BOUND = 2**63
"""Whole numbers lie below, and not below -_INT64_BOUND: JSON's readers and arrays hold no others."""


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return `config` as nested dicts of plain values, ready for JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    """Return a value with lists where there are tuples, as JSON gives them back."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Undo `config_to_dict`. An int is taken where a float is declared; fields with a default may be absent.

    Raises:
      ConfigError: for a field that is unknown or missing, a value of another type, or one that the config refuses.
    """
    return _build(TrainConfig, values, section="")


@functools.cache
def field_kinds() -> dict[str, type]:
    """Return the declared type of every field that holds a value, by dotted name: {"model.num_layers": int, ...}."""
    return dict(_walk(TrainConfig, prefix=""))


@functools.cache
def field_default(field: str) -> Any:
    """Return the default of a field by its dotted name, as in `config_to_dict`; NO_DEFAULT where it must be given."""
    cls, (*sections, name) = TrainConfig, field.split(".")
    for section in sections:
        cls = typing.get_type_hints(cls)[section]
    default = next(each.default for each in dataclasses.fields(cls) if each.name == name)
    return NO_DEFAULT if default is dataclasses.MISSING else _plain(default)


def unknown_field(field: str, value: Any) -> ConfigError:
    """Return the error for a dotted name that is no field: what it may have meant, and what its section holds."""
    got = f"{printable(field)}={shown(value)}"
    section = field.rpartition(".")[0]
    while section and not _members(section):
        section = section.rpartition(".")[0]
    if _members(field):
        inside = ", ".join(_members(field))
        return ConfigError(f"{got}: is a section; set one of its fields: {inside}")
    members = f"{section or 'the config'} has {', '.join(_members(section))}"
    hint = did_you_mean(field, field_kinds())
    return ConfigError(f"{got}: there is no such field; {hint}{members}")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return 'did you mean X? ' for the choice that ends as `name` does, else the one spelt most like it, else ''."""
    choices = list(choices)
    same_end = [choice for choice in choices if choice.rpartition(".")[2] == name.rpartition(".")[2]]
    found = same_end[:1] or difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {found[0]}? " if found else ""


def _build(cls: type, values: Any, *, section: str) -> Any:
    """Return an instance of the dataclass `cls`; `section` is its dotted name, empty for TrainConfig."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section or 'config'}={shown(values)}: is a section; give an object with its fields")
    kinds = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        field = f"{section}.{name}".removeprefix(".")
        if name not in kinds and _members(section):
            raise unknown_field(field, value)
        if name not in kinds:  # of an item of a list, which field_kinds does not name
            got = f"{printable(field)}={shown(value)}"
            raise ConfigError(f"{got}: there is no such field; {did_you_mean(name, kinds)}it has {', '.join(kinds)}")
        arguments[name] = _typed(field, value, kinds[name])
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            name = f"{section}.{field.name}".removeprefix(".")
            raise ConfigError(f"{name} is missing: it has no default; give it a value")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{section or 'config'}: {one_line(error)}") from error


def _typed(field: str, value: Any, kind: Any) -> Any:
    """Return `value` as the type `kind` that `field` declares, or ConfigError."""
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, section=field)
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _typed(field, value, typing.get_args(kind)[0])
    if is_list(kind):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{field}={shown(value)}: is {type(value).__name__}; give {words_of(kind)}")
        item = typing.get_args(kind)[0]
        return tuple(_typed(f"{field}.{number}", each, item) for number, each in enumerate(value))
    if type(value) is int and not -_INT64_BOUND <= value < _INT64_BOUND:
        raise ConfigError(f"{field}={shown(value)}: needs more than 64 bits; give {words_of(kind)} that is smaller")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{field}={shown(value)}: is {type(value).__name__}; give {words_of(kind)}")
    return value


def is_list(kind: Any) -> bool:
    """Return whether a declared type is `tuple[X, ...]`, a list in JSON."""
    return typing.get_origin(kind) is tuple


def words_of(kind: Any) -> str:
    """Return in words what a value of a declared type is."""
    if not is_list(kind):
        return KIND_WORDS[kind]
    item = typing.get_args(kind)[0]
    return f"a list of {'objects' if dataclasses.is_dataclass(item) else 'numbers'}"


def _walk(cls: type, prefix: str) -> Iterable[tuple[str, type]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _members(section: str) -> list[str]:
    """Return the names directly inside a section ("" is the whole config); none if there is no such section."""
    prefix = f"{section}." if section else ""
    inside = [field.removeprefix(prefix) for field in field_kinds() if field.startswith(prefix)]
    return list(dict.fromkeys(name.partition(".")[0] for name in inside))


def spelt(value: Any) -> str:
    """Return a value as it stands behind the equals sign of a flag."""
    if isinstance(value, list | tuple):
        return json.dumps([_given_fields(each) for each in value])
    return str(value).lower() if isinstance(value, bool) else str(value)


def _given_fields(value: Any) -> Any:
    """Return an item of a list as JSON takes it, without what an object leaves open."""
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value
