"""What a config that names a trained model need not say: the fields that follow from that model."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from ring_attention.checks import ConfigError, printable, shown
from ring_attention.data.config import DataConfig
from ring_attention.models.hf.config import config_from_hf
from ring_attention.models.hf.files import read_json
from ring_attention.models.hf.manifest import TOKENIZER
from ring_attention.models.hf.source import CONFIG, is_hf_folder
from ring_attention.training.config import AttentionConfig, OptimizerConfig, TrainConfig
from ring_attention.training.config_values import config_from_dict, config_to_dict, field_default
from ring_attention.training.initial import FREE_FIELDS, has_begun
from ring_attention.training.run_folder import RunFolder, read_config
from ring_attention.training.trained import open_trained

_STEPS = 100
"""Of a config that is made from a checkpoint, which says nothing of training."""

_OF_ATTENTION = ("attention.window", "attention.softcap")


def inherit(config: TrainConfig, told: Mapping[str, str]) -> TrainConfig:
    """`config` with what the model that it begins with says, wherever it leaves a field at its default.

    These are the fields of the model but for FREE_FIELDS, and attention's window and softcap. A run that has begun
    keeps to its own config.json, since what it began with may be gone.

    Args:
      config: as a config file has it.
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
    """The config for a model of the shape, rope, window and dtype that a Hugging Face folder's config.json says.

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
    dtype = values.get("dtype", values.get("torch_dtype"))
    model = dataclasses.replace(config.model, compute_dtype="bfloat16" if dtype == "bfloat16" else "float32")
    return TrainConfig(
        name=path.absolute().name,
        model=model,
        seq_len=config.max_len,
        num_steps=_STEPS,
        attention=AttentionConfig(window=config.window),
        data=DataConfig(tokenizer=str(path.absolute() / TOKENIZER)),
        optimizer=OptimizerConfig(warmup_steps=_STEPS // 10),
    )


def _config_of(begin: str) -> TrainConfig:
    try:
        return open_trained(begin).config
    except ConfigError as error:
        raise ConfigError(f"init_from={shown(begin)}: {error}") from error


def _follows(field: str) -> bool:
    """Whether a field follows from the model that a run begins with."""
    section, _, name = field.partition(".")
    return field in _OF_ATTENTION or section == "model" and name not in FREE_FIELDS


def _is_scaling(field: str) -> bool:
    return field.startswith("model.rope.") and field != "model.rope.theta"


def _contradiction(begin: str, wrong: Collection[str], ours: Mapping[str, Any], theirs: Mapping[str, Any]):
    each = ", ".join(f"{field}={shown(ours[field])} (there {shown(theirs[field])})" for field in wrong)
    remedy = "leave them out of the config, or set on the command line what is to change"
    return ConfigError(f"{each}: init_from={shown(begin)} holds another model; {remedy}")
