"""The folder of a run: what is in it, and whether a config may go on with it."""

import dataclasses
import json
import os
from pathlib import Path

from flax.traverse_util import flatten_dict

from ring_attention.checks import ConfigError
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import config_to_dict, field_kinds

# Fields that say when to look at a run and where to keep it; every other field changes what comes out.
FREE_FIELDS = ("name", "run_dir", "log_every", "eval_every", "checkpoint_every")

_ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def loss_plot(self) -> Path:
        """The picture of the losses."""
        return self.path / "loss.png"


def open_run_folder(config: TrainConfig) -> RunFolder:
    """Create the folder of `config`'s run, or check that `config` goes on with the run that is there.

    The folder is `config.run_dir`, or `runs/<name>` when that is empty. Its config.json is (re)written in one move, so
    that processes that share a file system may all call this.

    Raises:
      ConfigError: if the folder holds a run of another config (FREE_FIELDS aside), or cannot be written.
    """
    folder = RunFolder(Path(config.run_dir or Path("runs", config.name)))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if folder.config.exists():
            _require_same(folder, config)
        partial = folder.path / f".config.json.{os.getpid()}"
        partial.write_text(json.dumps(config_to_dict(config), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder.config)
    except OSError as error:
        remedy = "give a folder that you may write with --config.run_dir=PATH"
        raise ConfigError(f"run_dir={str(folder.path)!r}: cannot be written ({error.strerror}); {remedy}") from error
    return folder


def _require_same(folder: RunFolder, config: TrainConfig) -> None:
    """Raise ConfigError unless config.json and `config` agree on every field that changes what comes out."""
    other_folder = "start another run with --config.run_dir=PATH"
    try:
        stored = flatten_dict(json.loads(folder.config.read_text(encoding="utf-8")), sep=".")
    except (ValueError, AssertionError) as error:  # flatten_dict asserts that it got a dict
        raise ConfigError(f"{folder.config} is not a config in JSON; mend it or {other_folder}") from error
    current = flatten_dict(config_to_dict(config), sep=".")
    for field in [*current, *stored]:
        before, now = stored.get(field, _ABSENT), current.get(field, _ABSENT)
        if before != now and field not in FREE_FIELDS:
            undo = f"go back with --config.{field}={before} or " if field in field_kinds() and before != _ABSENT else ""
            raise ConfigError(f"{field}={now!r}: {folder.path} holds a run with {before!r}; {undo}{other_folder}")
