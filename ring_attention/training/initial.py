"""The state that a run begins with: parameters drawn at random, or those of a trained model."""

import shutil
from pathlib import Path

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from ring_attention.checks import ConfigError, require_field
from ring_attention.data.tokenizers import BYTES
from ring_attention.models.hf.files import is_regular
from ring_attention.models.hf.manifest import FOLDER, keep
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import config_to_dict
from ring_attention.training.processes import is_first
from ring_attention.training.run_folder import RunFolder
from ring_attention.training.step import TrainState, make_state, state_with
from ring_attention.training.trained import Trained, open_trained

FREE_FIELDS = ("compute_dtype", "remat", "head_groups", "ffn_chunk", "loss_chunk", "start_local")
"""Of the model: fields that may differ from those of the model that a run begins with, as may the section rope. They
say how the same parameters are computed with, or how others would have been drawn."""


_SAID = ("attention.window", "attention.softcap")
"""Of attention: fields that change the function of a model, and may."""


def find_initial(config: TrainConfig) -> Trained | None:
    """The trained model that `config.init_from` names, if it names one; reads no arrays.

    Raises:
      ConfigError: if there is none, its model is another but for rope and FREE_FIELDS, or its tokens are others.
    """
    if not config.init_from:
        return None
    try:
        trained = open_trained(config.init_from)
    except ConfigError as error:
        raise ConfigError(f"init_from={config.init_from!r}: {error}") from error
    theirs = flatten_dict(config_to_dict(trained.config)["model"], sep=".")
    ours = flatten_dict(config_to_dict(config)["model"], sep=".")
    free = lambda field: field in FREE_FIELDS or field.startswith("rope.")  # noqa: E731
    wrong = [field for field, value in ours.items() if value != theirs[field] and not free(field)]
    if wrong:
        got = ", ".join(f"model.{field}={ours[field]!r}" for field in wrong)
        need = f"init_from={config.init_from!r} holds a model with {', '.join(repr(theirs[field]) for field in wrong)}"
        remedy = f"use {' '.join(f'--config.model.{field}={theirs[field]}' for field in wrong)}"
        raise ConfigError(f"{got}: {need}; {remedy}")
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


def describe_initial(config: TrainConfig, trained: Trained) -> list[str]:
    """Lines that say where a run begins, and what it changes of the model."""
    lines = [f"Beginning with the parameters of {trained.checkpoint}."]
    theirs = flatten_dict(config_to_dict(trained.config), sep=".")
    for field, ours in flatten_dict(config_to_dict(config), sep=".").items():
        if ours != theirs[field] and (field in _SAID or field.startswith("model.rope.")):
            lines.append(f"{field} was {theirs[field]!r} and is {ours!r}.")
    made_for = trained.config.seq_len
    if config.model.rope == trained.model.rope and config.seq_len > made_for:
        lines.append(
            f"seq_len={config.seq_len:,} is beyond the {made_for:,} tokens that the model was made for, and its rotary "
            "positions are as they were; a larger --config.model.rope.theta, or a --config.model.rope.scaling, helps."
        )
    return lines


def has_begun(folder: RunFolder) -> bool:
    """Whether a run has a checkpoint to go on from, and what it began with no longer matters."""
    return any(file.name.isdecimal() for file in folder.checkpoints.glob("*"))


def initial_state(config: TrainConfig, mesh: Mesh, folder: RunFolder) -> TrainState:
    """The state before the first step, on the devices where it will live.

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


def _keep(trained: Trained, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    kept = trained.kept
    if trained.source is not None:
        keep(trained.source, target)
    elif kept is not None:
        shutil.copytree(kept.path, target)


def _same_tokens(ours: str, theirs: str) -> bool:
    """Whether two tokenizers are one; True where theirs is not there to be compared."""
    if ours == theirs or theirs != BYTES and not is_regular(Path(theirs)):
        return True
    return (
        BYTES not in (ours, theirs) and is_regular(Path(ours)) and Path(ours).read_bytes() == Path(theirs).read_bytes()
    )
