"""From the command line to a `TrainConfig`.

    python train.py --config=configs/NAME.py --config.model.num_layers=4 --config.mesh.sp=8

A config file defines `get_config() -> TrainConfig`; its docstring says the command, what it costs and what comes out.
Whatever cannot work raises `ConfigError` with one line, before JAX looks for a device.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import runpy
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_flags

from ring_attention.checks import ConfigError, one_line, printable, require_local, shown
from ring_attention.models.hf.presets import PRESETS, REFUSED
from ring_attention.models.hf.source import CONFIG
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import (
    config_from_dict,
    config_to_dict,
    did_you_mean,
    field_kinds,
    is_list,
    spelt,
    unknown_field,
    words_of,
)
from ring_attention.training.init_from import config_from_folder, config_from_preset, inherit
from ring_attention.training.processes import ProcessFlags

CONFIGS = Path("configs")
"""Where config files are looked for first: in the working directory, as in a checkout."""

PACKAGED_CONFIGS = Path(__file__).parents[1] / "configs"
"""The config files that come with the package."""

_LONGEST_NAME = 200
_PROGRAM = "train.py"  # absl takes the first argument for the program's name


def parse_config(argv: list[str], default: str, *, program: str = "python train.py") -> TrainConfig:
    """Return the config that a command line asks for.

    Args:
      argv: the arguments after the program's name: `--config=PATH`, or the name of a config in CONFIGS or
        PACKAGED_CONFIGS, and `--config.FIELD=VALUE`s, of which the last wins. What neither says of the model comes
        from the one that init_from names (`inherit`). With `--help` the usage is printed and the process exits with 0.
      default: the config to take without `--config`.
      program: how the command is written, for the usage.

    Raises:
      ConfigError: in one line, for a file, field, value, flag or stray word that cannot be used.
    """
    if not {"-h", "-help", "--help"}.isdisjoint(argv):
        print(usage(default, program))
        raise SystemExit(0)
    path, rest = split_path(argv, default)
    texts = _override_texts(rest)
    return override(inherit(load_config(path), texts), rest)


def override(config: TrainConfig, argv: list[str]) -> TrainConfig:
    """Return `config` with what the `--config.FIELD=VALUE`s of a command line change; raises as `parse_config`."""
    values = flatten_dict(config_to_dict(config), sep=".")
    for field, text in _override_texts(argv).items():
        values[field] = _read_text(field, text, example=values[field])
    return config_from_dict(unflatten_dict(values, sep="."))


def parse_processes(argv: list[str]) -> tuple[ProcessFlags, list[str]]:
    """Return what a command line says of processes, and the arguments that remain for `parse_config`.

    Raises:
      ConfigError: in one line, for values that are none.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes of the run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process", flag_values=values)
    flags.DEFINE_integer("join_timeout", None, "seconds to wait for the others", flag_values=values)
    rest = _parse(values, argv, known_only=True)
    return ProcessFlags(**{field.name: values[field.name].value for field in dataclasses.fields(ProcessFlags)}), rest


def load_config(path: str | Path) -> TrainConfig:
    """Return what `get_config()` of the file at `path` returns, or of the config whose name `path` is.

    A name is looked for in CONFIGS, in PACKAGED_CONFIGS, then in PRESETS, the well-known models. Of a folder that holds
    a Hugging Face checkpoint, return a config for a model like it (`config_from_folder`).

    Raises:
      ConfigError: if the file is missing, fails, or does not give a TrainConfig.
    """
    flag = printable(f"--config={path}")
    require_local("--config", path)
    if os.path.lexists(os.path.join(path, CONFIG)):
        return config_from_folder(Path(path))
    name, path = str(path), _find_config(path)
    if not path.is_file():
        if name in PRESETS or name in REFUSED:
            return config_from_preset(name)
        files = _config_files()
        hint = did_you_mean(name.removesuffix(".py").rpartition("/")[2], [*(file.stem for file in files), *PRESETS])
        known = ", ".join([*map(_spelt_config, files), *PRESETS])
        raise ConfigError(f"{flag}: there is no such file; {hint}choose one of {known}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except Exception as error:  # whatever a config file does wrong, one line with the file's name is what helps
        raise ConfigError(f"{flag}: {type(error).__name__}: {one_line(error)}; correct the file") from error
    if not callable(get_config):
        raise ConfigError(f"{flag}: defines no get_config; add `def get_config() -> TrainConfig` to the file")
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{flag}: get_config returned {type(config).__name__}; let it return a TrainConfig")
    return config


def _find_config(path: str | Path) -> Path:
    """Return `path`, or the config that is called so: tiny and tiny.py are configs/tiny.py."""
    path = Path(path)
    if path.name != str(path) or path.is_file():
        return path
    files = (folder / f"{path.name.removesuffix('.py')}.py" for folder in (CONFIGS, PACKAGED_CONFIGS))
    return next((file for file in files if file.is_file()), path)


def usage(default: str, program: str = "python train.py") -> str:
    """Return the text of `--help`: how to write the command, the config files, and every field."""
    files = [f"  {_spelt_config(file)}\n{_indented(_first_line(file))}" for file in _config_files()]
    lines = [
        "Train a Transformer on sequences that are sharded across devices.",
        "",
        f"  {program}   (the same as --config={default})",
        f"  {program} --config=FOLDER/NAME.py   (--config=NAME for those below)",
        f"  {program} --config=NAME --config.model.num_layers=4 --config.mesh.sp=8",
        f"  {program} --config=FOLDER   (a model like a Hugging Face checkpoint's)",
        f"  {program} --config=llama-3.1-8b   (the shape of a well-known model)",
        "",
        "On several processes, where no cluster says which is which (see docs/pods.md):",
        *_describe(ProcessFlags, prefix="--"),
        "",
        "Config files:",
        *files,
        "",
        "Well-known models, by the shape that their config.json has:",
        _indented(", ".join(PRESETS)),
        "",
        "Fields and their defaults (a config file sets them, --config.FIELD=VALUE",
        "overrides them):",
        *_describe(TrainConfig, prefix="--config."),
    ]
    return "\n".join(lines)


def split_path(argv: list[str], default: str) -> tuple[str, list[str]]:
    """Return the path that `--config` names, or `default`, and the arguments that remain."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", default, "path of the config file", flag_values=values)
    rest = _parse(values, argv, known_only=True)
    return values["config"].value, rest


def _override_texts(argv: list[str]) -> dict[str, str]:
    """Return the text that `argv` gives to each dotted field; raise ConfigError for anything else in it."""
    for arg, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name = _flag_name(arg)
        field = name.removeprefix("config.")
        if arg.startswith("-") and field != name and field not in field_kinds():
            raise unknown_field(field, arg.partition("=")[2] if "=" in arg else following)
    # Every field is text to ml_collections. It would go by the type of the value in the config file, and refuse 0.5
    # where the file says learning_rate=1; here the declared type decides.
    fields = ConfigDict(unflatten_dict(dict.fromkeys(field_kinds(), ""), sep="."))
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", fields, flag_values=values, sys_argv=[_PROGRAM, *argv])
    strays = _parse(values, argv)
    if strays:
        stray = shown(strays[0])
        raise ConfigError(f"{stray} is not a flag; write --config=PATH or --config.FIELD=VALUE, or see --help")
    return config_flags.get_override_values(values["config"])


def _parse(values: flags.FlagValues, argv: list[str], *, known_only: bool = False) -> list[str]:
    """Parse `argv` into `values` and return the words it leaves; absl's errors become ConfigError."""
    for arg in argv:  # absl's own flags would bring in, or hide, flags that are not on the command line
        name = _flag_name(arg)
        too_long = len(name) > _LONGEST_NAME  # absl looks for one that is like it, a call for each letter
        if arg.startswith("-") and (name in ("flagfile", "undefok") or too_long):
            raise _unknown_flag(arg)
    try:
        return values([_PROGRAM, *argv], known_only=known_only)[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        raise _unknown_flag(next((arg for arg in argv if _flag_name(arg) == name), f"--{name}")) from None
    except flags.Error as error:
        raise ConfigError(f"{one_line(error)}; write --config=PATH or --config.FIELD=VALUE") from None


def _flag_name(arg: str) -> str:
    """Return what stands between the dashes and the equals sign."""
    return arg.lstrip("-").partition("=")[0]


def _unknown_flag(arg: str) -> ConfigError:
    hint = did_you_mean(_flag_name(arg), ["--config", *(f"--config.{field}" for field in field_kinds())])
    start = arg if len(arg) <= _LONGEST_NAME else f"{arg[:_LONGEST_NAME]}..."
    return ConfigError(
        f"{printable(start)}: there is no such flag; {hint}write --config=PATH or --config.FIELD=VALUE, or see --help"
    )


def _read_text(field: str, text: str, *, example: Any) -> Any:
    """Return the value of `field` that `text` spells, or raise ConfigError; `example` is a value it may have."""
    kind = field_kinds()[field]
    readers = {int: int, float: float, str: str, bool: lambda x: {"true": True, "false": False}.get(x.lower())}
    try:
        value = (json.loads if is_list(kind) else readers[kind])(text)
    except ValueError:
        value = None
    if value is None or (kind is float and not math.isfinite(value)):
        remedy = f"write it like --config.{field}={spelt(example)}"
        raise ConfigError(f"{field}={shown(text)}: must be {words_of(kind)}; {remedy}")
    return value


def _config_files() -> list[Path]:
    """Return the configs to choose from: those of CONFIGS or, where that is no folder, the packaged ones."""
    folder = CONFIGS if CONFIGS.is_dir() else PACKAGED_CONFIGS
    return sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))


def _spelt_config(file: Path) -> str:
    """Return what `--config` takes for one of `_config_files`."""
    return file.stem if file.parent == PACKAGED_CONFIGS else str(file)


def _first_line(file: Path) -> str:
    """Return the first line of a Python file's docstring, empty if it has none or does not parse."""
    try:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    except (SyntaxError, ValueError):
        docstring = None
    return (docstring or "").partition("\n")[0]


def _describe(cls: type, prefix: str, indent: str = "  ") -> Iterator[str]:
    """Yield a paragraph for every field under `cls`, in the words of the "Attributes" in its docstring."""
    entries = re.findall(r"^ {2}(\w[\w, ]*): (.+(?:\n {4}.+)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    words = {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
    kinds = typing.get_type_hints(cls)
    for name in sorted(kinds, key=lambda name: dataclasses.is_dataclass(kinds[name])):  # sections come last
        if dataclasses.is_dataclass(kinds[name]):
            yield from ["", *_describe(kinds[name], f"{prefix}{name}.")]
            continue
        kind, *_ = typing.get_args(kinds[name]) or [kinds[name]]  # int of int | None
        what = f"list of {kind.__name__}" if is_list(kinds[name]) else kind.__name__
        yield f"{indent}{prefix}{name}  {what}, {_default_of(cls, name)}"
        yield _indented(words.get(name, ""), f"{indent}    ")
        if is_list(kinds[name]) and dataclasses.is_dataclass(kind):
            yield from _describe(typing.cast(type, kind), "", f"{indent}    ")


def _indented(text: str, indent: str = " " * 6) -> str:
    """Return `text` as an indented paragraph that fits a terminal of 80 columns."""
    return textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=indent)


def _default_of(cls: type, name: str) -> str:
    """Return in words what a field is where neither a config file nor a flag sets it."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    if field.default is dataclasses.MISSING:
        return "no default"
    return f"default {'none' if field.default is None else spelt(field.default).strip('[]') or 'empty'}"
