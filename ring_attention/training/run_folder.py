"""The folder of a run: what is in it, and whether a config and its documents may go on with it."""

import contextlib
import dataclasses
import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from ring_attention.checks import ConfigError, require_field
from ring_attention.json_files import write_json
from ring_attention.models.hf.files import read_json
from ring_attention.parallel.strategies import STRATEGIES
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import (
    NO_DEFAULT,
    config_from_dict,
    config_to_dict,
    field_default,
    field_kinds,
    spelt,
)
from ring_attention.training.fault_tolerance.disk import FolderLock
from ring_attention.training.processes import is_first

VERSION = 1
"""Version of the folder's layout and of config.json; raised when an older train.py would misread them."""

FREE_FIELDS = (
    *("name", "run_dir", "data.index_dir", "log_every", "eval_every", "checkpoint_every"),
    "optimizer.max_skipped_updates",
)
"""Fields that say when to look at a run, where to keep it and when to give up."""

PLACEMENT_FIELDS = (
    *("mesh.dp", "mesh.fsdp", "mesh.sp", "mesh.tp"),
    *("attention.strategy", "attention.duplex", "attention.unroll", "attention.head_groups", "attention.ulysses_size"),
    "attention.local_strategy",
    *("attention.layout", "attention.speeds", "attention.impl"),
    *("attention.block_q", "attention.block_kv", "attention.block_heads"),
    *("model.remat", "model.head_groups", "model.ffn_chunk", "model.loss_chunk"),
    "optimizer.accumulation_steps",
)
"""Fields that say where and in which order the same numbers are computed: a run may go on with others, and its losses
are then the same but for rounding. Every other field changes what comes out."""

BEFORE = {"data.train_on_end": False, "data.special_tokens": False}
"""Values of fields that runs had before there were such fields, whose config.json lacks them."""

_ABSENT = "(absent)"
_OTHER_FOLDER = "start another run with --config.run_dir=PATH"

DIGESTS = "contents.json"
"""Name of the file of digests in the run's folder."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        """File of the resolved config, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """File of the metrics, one JSON object a line."""
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
    def documents(self) -> Path:
        """Folder of the documents' index, and of the texts that were unpacked from archives."""
        return self.path / "documents"

    @property
    def loss_plot(self) -> Path:
        """File of the picture of the losses."""
        return self.path / "loss.png"


def folder_of(config: TrainConfig) -> RunFolder:
    """Return the folder where the run of a config is, or will be."""
    return RunFolder(Path(config.run_dir or Path("runs", config.name)))


@contextlib.contextmanager
def open_run_folder(config: TrainConfig, *, say: Callable[[str], None] = print) -> Iterator[RunFolder]:
    """Create the folder of `config`'s run, or check that `config` goes on with the run that is there; hold it.

    The folder is `config.run_dir`, or `runs/<name>` when that is empty. Of the processes of a run the first one locks
    it and (re)writes its config.json, in one move; all of them need to see the folder.

    Args:
      config: the config of the run.
      say: told, in a line each, of the PLACEMENT_FIELDS that changed since the run's last start.

    Raises:
      ConfigError: if the folder holds a run of another config or of a newer version, is in use by another run, or
        cannot be written.
    """
    folder = folder_of(config)
    first = is_first()
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder.path) if first else contextlib.nullcontext()
    except OSError as error:
        raise _unwritable(folder, error) from error
    with lock:
        try:
            if folder.config.exists():
                for change in _require_same(folder, config):
                    say(change)
            if first:
                write_config(folder, config)
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield folder


def write_config(folder: RunFolder, config: TrainConfig) -> None:
    """Write the config.json of a folder, in one move."""
    write_json(folder.config, {"version": VERSION} | config_to_dict(config))


def read_config(folder: RunFolder) -> TrainConfig:
    """Return the config of the run in a folder; ConfigError where it cannot be used."""
    return config_from_dict(unflatten_dict(_stored(folder), sep="."))


def _unwritable(folder: RunFolder, error: OSError) -> Exception:
    if error.errno == errno.ENOSPC:  # no mistake of the config's
        return error
    remedy = "give a folder that you may write with --config.run_dir=PATH"
    return ConfigError(f"run_dir={str(folder.path)!r}: cannot be written ({error.strerror}); {remedy}")


def _require_same(folder: RunFolder, config: TrainConfig) -> list[str]:
    """Raise ConfigError unless `config` may go on with the run of config.json; return what changed, in lines."""
    stored, current = _stored(folder), flatten_dict(config_to_dict(config), sep=".")
    changes = []
    for field in current | stored:
        before, now = stored.get(field, _ABSENT), current.get(field, _ABSENT)
        if before == now or field in FREE_FIELDS:
            continue
        same_function = not field.endswith("strategy") or (_is_exact(before) and _is_exact(now))
        if field not in PLACEMENT_FIELDS or not same_function:
            undo = ""
            if field in field_kinds() and before != _ABSENT:
                undo = f"go back with --config.{field}={spelt(before)} or "
            raise ConfigError(f"{field}={now!r}: {folder.path} holds a run with {before!r}; {undo}{_OTHER_FOLDER}")
        if field in current:
            changes.append(f"{field} was {before!r} and is {now!r}: the losses agree but for rounding.")
    return changes


def _stored(folder: RunFolder) -> dict[str, Any]:
    """Return the fields of config.json; ConfigError where it is none, or of a newer version."""
    stored = flatten_dict(read_json(folder.config, f"mend it or {_OTHER_FOLDER}", kind="a config in JSON"), sep=".")
    version = stored.pop("version", None)
    if version is not None:
        defaults = {field: field_default(field) for field in field_kinds()}
        stored = {f: value for f, value in (defaults | BEFORE).items() if value is not NO_DEFAULT} | stored
    require_field(
        version is not None,
        "version",
        version,
        f"{folder.config} was written by an older train.py, whose checkpoints this one cannot check",
        _OTHER_FOLDER,
    )
    require_field(
        isinstance(version, int) and version <= VERSION,
        "version",
        version,
        f"{folder.config} was written by a newer train.py, this one knows versions up to {VERSION}",
        f"update ring_attention or {_OTHER_FOLDER}",
    )
    return stored


def _is_exact(strategy: Any) -> bool:
    return not strategy or strategy in STRATEGIES and STRATEGIES[strategy].exact


def require_same_contents(folder: RunFolder, now: dict[str, str], *, has_begun: bool) -> None:
    """Raise ConfigError unless a run that `has_begun` reads what it began with; one that begins writes that down.

    A folder from before there was such a file is believed, and gets one.
    """
    path = folder.path / DIGESTS
    before = _read(path) if has_begun and path.exists() else now
    for field, words in now.items():
        if before.get(field) != words:
            raise ConfigError(
                f"{field}: its contents are others ({words}) than those that the run in {folder.path} began with "
                f"({before.get(field)}); put those back, start another run with --config.run_dir=PATH, or go on with "
                f"the new ones by removing {path}"
            )
    if is_first():
        write_json(path, now)


def _read(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not an object in JSON; remove it to go on without comparing contents")
    return values
