"""What a run begins with: parameters drawn at random, or the trained model that `init_from` names."""

import dataclasses
import shlex
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from ring_attention.checks import ConfigError, printable, require_field, shown
from ring_attention.data.config import DataConfig
from ring_attention.data.tokenizers import BYTES
from ring_attention.models.hf.config import config_from_hf
from ring_attention.models.hf.facts import FREE_MODEL_FIELDS
from ring_attention.models.hf.files import is_regular, read_json
from ring_attention.models.hf.manifest import FOLDER, write_manifest
from ring_attention.models.hf.presets import PRESETS, REFUSED
from ring_attention.models.hf.source import CONFIG, is_hf_folder
from ring_attention.models.transformer import abstract_parameters
from ring_attention.training.checkpoints import written_steps
from ring_attention.training.config import OptimizerConfig, TrainConfig
from ring_attention.training.config_values import config_from_dict, config_to_dict, field_default, spelt
from ring_attention.training.processes import is_first
from ring_attention.training.run_folder import RunFolder, read_config
from ring_attention.training.state import TrainState, make_state, state_with
from ring_attention.training.trained_model import TrainedModel, config_of, open_trained_model

_OF_ATTENTION = tuple(f"attention.{name}" for name in ("window", "chunk", "sinks", "softcap", "alibi"))
"""Fields of attention that follow from the model that a run begins with, and may be set to something else."""

_STEPS = 100
"""Number of steps in a config that is made from a checkpoint, which says nothing of training."""


def find_initial(config: TrainConfig) -> TrainedModel | None:
    """Return the trained model that `config.init_from` names, None if it names none; reads no arrays.

    Raises:
      ConfigError: if there is none, its model is another but for FREE_MODEL_FIELDS, rope and what layers see, or its
        tokens are others.
    """
    if not config.init_from:
        return None
    try:
        trained = open_trained_model(config.init_from)
    except ConfigError as error:
        raise ConfigError(f"init_from={config.init_from!r}: {error}") from error
    _require_same_model(config, trained.config)
    tokenizer = trained.config.data.tokenizer
    from_init = f"the parameters of init_from={config.init_from!r} were trained with"
    require_field(
        config.data.tokenizer != BYTES or tokenizer == BYTES or is_regular(Path(tokenizer)),
        "data.tokenizer",
        config.data.tokenizer,
        f"{from_init} a tokenizer that is not there, {tokenizer}",
        "use --config.data.tokenizer=PATH with the path of its tokenizer.json",
    )
    require_field(
        _same_tokens(config.data.tokenizer, tokenizer),
        "data.tokenizer",
        config.data.tokenizer,
        f"{from_init} other tokens",
        f"use --config.data.tokenizer={tokenizer}",
    )
    return trained


def _require_same_model(config: TrainConfig, trained: TrainConfig) -> None:
    """Raise ConfigError unless the parameters of `trained` are those of a model that computes as `config` says."""
    theirs, ours = (flatten_dict(config_to_dict(x), sep=".") for x in (trained, config))
    in_files = ("model.layers", "attention.sinks")  # say which parameters there are, and what layers see, which is free
    free = {f"model.{name}" for name in FREE_MODEL_FIELDS}.union(in_files)
    fixed = [f for f in ours if f.startswith("model.") and not f.startswith("model.rope.") and f not in free]
    wrong = [field for field in fixed if ours[field] != theirs[field]]
    if not wrong and _parameters(config) != _parameters(trained):
        wrong = [field for field in in_files if ours[field] != theirs[field]]
    if wrong:
        got = ", ".join(f"{field}={_words(ours[field])}" for field in wrong)
        held = ", ".join(_words(theirs[field]) for field in wrong)
        remedy = " ".join(shlex.quote(f"--config.{field}={_words(theirs[field])}") for field in wrong)
        raise ConfigError(f"{got}: init_from={config.init_from!r} holds a model with {held}; use {remedy}")


def _words(value: Any) -> str:
    """Return a value as messages have it: a list as on a command line."""
    return spelt(value) if isinstance(value, list) else repr(value)


def _parameters(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, by its path."""
    return {path: x.shape for path, x in flatten_dict(abstract_parameters(config.transformer), sep=".").items()}


def describe_initial(config: TrainConfig, trained: TrainedModel) -> list[str]:
    """Return lines that say where a run begins, and what it changes of the model."""
    lines = [f"Beginning with the parameters of {trained.checkpoint}."]
    theirs = flatten_dict(config_to_dict(trained.config), sep=".")
    for field, ours in flatten_dict(config_to_dict(config), sep=".").items():
        if ours != theirs[field] and (field in _OF_ATTENTION or field.startswith(("model.rope.", "model.layers"))):
            lines.append(f"{field} was {_words(theirs[field])} and is {_words(ours)}.")
    made_for = trained.config.seq_len
    if config.model.rope == trained.model.rope and config.seq_len > made_for:
        lines.append(
            f"seq_len={config.seq_len:,} is beyond the {made_for:,} tokens that the model was made for, and its rotary "
            "positions are as they were; a larger --config.model.rope.theta, or a --config.model.rope.scaling, helps."
        )
    return lines


def has_begun(folder: RunFolder) -> bool:
    """Return whether a run has a checkpoint to go on from, so that what it began with no longer matters."""
    return bool(written_steps(folder.checkpoints))


def initial_state(config: TrainConfig, mesh: Mesh, folder: RunFolder) -> TrainState:
    """Return the state before the first step, on the devices where it will live.

    What is needed to write a Hugging Face checkpoint again goes with the parameters, into the run's folder.

    Raises:
      ConfigError: as `find_initial`, or if the parameters cannot be read.
    """
    trained = find_initial(config)
    if trained is None:
        return make_state(config, mesh)
    if is_first():
        _keep(trained, folder.path / FOLDER)
    return state_with(config, mesh, trained.load(mesh))


def _keep(trained: TrainedModel, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    manifest = trained.manifest
    if trained.source is not None:
        write_manifest(trained.source, target)
    elif manifest is not None:
        shutil.copytree(manifest.path, target)


def _same_tokens(ours: str, theirs: str) -> bool:
    """Return whether two tokenizers are one; True where theirs is not there to be compared."""
    if ours == theirs or theirs != BYTES and not is_regular(Path(theirs)):
        return True
    return (
        BYTES not in (ours, theirs) and is_regular(Path(ours)) and Path(ours).read_bytes() == Path(theirs).read_bytes()
    )


def inherit(config: TrainConfig, told: Mapping[str, str]) -> TrainConfig:
    """Return `config` with what the model that it begins with says, wherever it leaves a field at its default.

    These are the fields of the model but for FREE_MODEL_FIELDS, and attention's window and softcap. A run that has
    begun keeps to its own config.json, since what it began with may be gone.

    Args:
      config: what a config file returned.
      told: dotted fields that the command line sets, and to what; they are left alone, and may say something else.

    Raises:
      ConfigError: for all fields that contradict the model, in one line with both values; or where there is none.
    """
    begin = told.get("init_from", config.init_from)
    if not begin:
        return config
    folder = RunFolder(Path(told.get("run_dir", config.run_dir) or Path("runs", told.get("name", config.name))))
    begun = has_begun(folder)
    theirs = flatten_dict(config_to_dict(read_config(folder) if begun else _config_of(begin)), sep=".")
    ours = flatten_dict(config_to_dict(config), sep=".")
    another_scaling = "model.rope.scaling" in told  # whose factors are not those of the model's own
    fields = [f for f in ours if _follows(f) and f not in told and not (another_scaling and _is_scaling(f))]
    wrong = [field for field in fields if ours[field] not in (theirs[field], field_default(field))]
    if wrong and begun:
        return config  # the run's folder says what changed
    if wrong:
        raise _contradiction(begin, wrong, ours, theirs)
    return config_from_dict(unflatten_dict(ours | {field: theirs[field] for field in fields}, sep="."))


def config_from_folder(path: Path) -> TrainConfig:
    """Return the config for a model of the shape, rope, window and dtype that a Hugging Face config.json says.

    Its weights are not read, and need not be there. Parameters are drawn at random unless init_from names them.

    Raises:
      ConfigError: if the folder holds no such config.json, or what is not implemented.
    """
    where = printable(f"--config={path}")
    if not is_hf_folder(path):
        need = f"is a folder without a {CONFIG} of Hugging Face"
        raise ConfigError(f"{where}: {need}; give a config file, or the folder of a checkpoint")
    values = read_json(path / CONFIG)
    try:
        config = config_from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return _computed_as_stored(config_of(path, config), values)


def config_from_preset(name: str) -> TrainConfig:
    """Return the config for a model of the shape, rope, window and dtype of one of PRESETS.

    Raises:
      ConfigError: for a name in REFUSED, with the reason.
    """
    if name in REFUSED:
        raise ConfigError(f"--config={name}: {REFUSED[name]}; choose one of {', '.join(PRESETS)}")
    values = PRESETS[name].values
    config = dataclasses.replace(config_of(Path(name), config_from_hf(values)), data=DataConfig())
    return _computed_as_stored(config, values)


def _computed_as_stored(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return the config with the dtype that a config.json states, and so many steps that it can train."""
    dtype = values.get("dtype", values.get("torch_dtype"))
    model = dataclasses.replace(config.model, compute_dtype="bfloat16" if dtype == "bfloat16" else "float32")
    optimizer = OptimizerConfig(warmup_steps=_STEPS // 10)
    return dataclasses.replace(config, model=model, num_steps=_STEPS, optimizer=optimizer)


def _config_of(begin: str) -> TrainConfig:
    try:
        return open_trained_model(begin).config
    except ConfigError as error:
        raise ConfigError(f"init_from={shown(begin)}: {error}") from error


def _follows(field: str) -> bool:
    """Return whether a field follows from the model that a run begins with."""
    section, _, name = field.partition(".")
    return field in _OF_ATTENTION or section == "model" and name not in FREE_MODEL_FIELDS


def _is_scaling(field: str) -> bool:
    return field.startswith("model.rope.") and field != "model.rope.theta"


def _contradiction(begin: str, wrong: Collection[str], ours: Mapping[str, Any], theirs: Mapping[str, Any]):
    each = ", ".join(f"{field}={shown(ours[field])} (there {shown(theirs[field])})" for field in wrong)
    remedy = "leave them out of the config, or set on the command line what is to change"
    return ConfigError(f"{each}: init_from={shown(begin)} holds another model; {remedy}")
