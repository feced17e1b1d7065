"""A trained model as it is to be measured: with another mesh, attention or rotary embedding, if that is asked for."""

import dataclasses
import datetime
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ring_attention.checks import ConfigError, require_field, require_local
from ring_attention.data.tokenizers import Tokenizer, load_tokenizer
from ring_attention.inference.ends import prompt_start
from ring_attention.parallel.mesh import DATA, FSDP, SEQUENCE
from ring_attention.training.config import AttentionConfig, TrainConfig
from ring_attention.training.config_values import config_to_dict
from ring_attention.training.devices import open_mesh
from ring_attention.training.flags import override
from ring_attention.training.trained_model import TrainedModel, open_trained_model
from ring_attention.training.validate import check_vocabulary, validate_config

FREE_SECTIONS = ("mesh", "attention", "model.rope")
"""What may be changed of a trained model without training it again."""

BATCH_TOKENS = 2**15
"""Tokens that are read at once by default."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A trained model, the config to measure it with, its tokenizer and its devices."""

    trained: TrainedModel
    config: TrainConfig
    tokenizer: Tokenizer
    mesh: Mesh

    @property
    def start(self) -> tuple[int, ...]:
        """What a text begins with, as in generation."""
        return tuple(prompt_start(self.trained, self.tokenizer))

    def rows(self, length: int, texts: int, wanted: int = 0) -> int:
        """Texts that are read at once: a multiple of the devices that share them; `wanted` of them, if it is given."""
        shards = self.mesh.shape[DATA] * self.mesh.shape[FSDP]
        rows = wanted or min(texts, max(1, BATCH_TOKENS // length))
        return math.ceil(rows / shards) * shards

    def check(self, length: int, rows: int, attention: AttentionConfig | None = None) -> None:
        """Raise ConfigError unless texts of this length can be read so many at once, before anything is compiled."""
        attention = attention or self.config.attention
        seq_len = attention.make_layout(self.mesh.shape[SEQUENCE]).padded_length(length)
        optimizer = dataclasses.replace(self.config.optimizer, accumulation_steps=1)
        sizes = dict(seq_len=seq_len, batch_size=rows, eval_sequences=rows)
        config = dataclasses.replace(self.config, attention=attention, optimizer=optimizer, **sizes)
        validate_config(config, dict(self.mesh.shape), self.mesh.devices.flat[0].platform)

    def load(self) -> Any:
        """Return the parameters, in the compute dtype."""
        return self.trained.load(self.mesh, dtype=self.config.model.compute_dtype)


def open_model(checkpoint: str, overrides: Sequence[str] = ()) -> ModelSource:
    """Find the model and its devices; reads no arrays.

    Args:
      checkpoint: as `open_trained_model` takes it.
      overrides: `--config.FIELD=VALUE`s of the FREE_SECTIONS.

    Raises:
      ConfigError: if it does not exist or cannot be changed so.
    """
    trained = open_trained_model(checkpoint)
    config = override(trained.config, list(overrides))
    for word in overrides:
        field = word.lstrip("-").partition("=")[0].removeprefix("config.")
        free = not word.startswith("-") or any(field.startswith(f"{section}.") for section in FREE_SECTIONS)
        if not free:
            raise ConfigError(f"{word}: is a matter of training; change only {', '.join(FREE_SECTIONS)}")
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(config, tokenizer)
    return ModelSource(trained, config, tokenizer, open_mesh(config.mesh))


def output_folder(checkpoint: str, out: str | None) -> Path:
    """Return the folder that results go to, made if need be; by default one below runs/evaluation.

    Raises:
      ConfigError: if it cannot be made.
    """
    require_local("out", out or "")
    folder = Path(out) if out else Path("runs", "evaluation", Path(checkpoint).resolve().name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={str(folder)!r}: cannot be made ({error.strerror}); name another folder") from error
    return folder


def write_results(path: Path, model: ModelSource, results: Mapping[str, Any]) -> None:
    """Write numbers as JSON, with the model and the config that they belong to and the versions that made them."""
    packages = ("ring_attention", "jax", "jaxlib", "flax", "numpy")
    device = model.mesh.devices.flat[0]
    about = {
        "checkpoint": str(model.trained.checkpoint),
        "trained_seq_len": model.trained.config.seq_len,
        "config": config_to_dict(model.config),
        "mesh": dict(model.mesh.shape),
        "device": f"{model.mesh.size} x {device.device_kind} ({jax.default_backend()})",
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    path.write_text(json.dumps({**results, **about}, indent=1) + "\n")


def require_positive(**values: int) -> None:
    """Raise ConfigError, naming the flag, unless each value is positive."""
    for name, value in values.items():
        require_field(value > 0, name, value, "must be positive", "give at least 1")
