"""A folder that is there when it is complete, and not before."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ring_attention.checks import ConfigError, require_field, require_local
from ring_attention.training.survival.errors import RunError


def require_new(path: Path, flag: str) -> None:
    """Raise ConfigError unless `path`, which `flag` names, does not exist or is an empty folder."""
    require_local(flag, path)
    held = path.exists() and (not path.is_dir() or any(path.iterdir()))
    require_field(not held, flag, str(path), "is there already, and not empty", "remove it, or give another folder")


@contextlib.contextmanager
def new_folder(path: Path, num_bytes: int, flag: str) -> Iterator[Path]:
    """Give a folder to write into, which becomes `path` at the end; whatever ends the block before leaves nothing.

    Args:
      path: that does not exist, or is empty.
      num_bytes: that will be written, for which the disk must have room.
      flag: that `path` came from, for messages.

    Raises:
      ConfigError: if `path` cannot be made, holds something, or its disk has no room.
      RunError: if the disk refuses while it is written.
    """
    require_local(flag, path)
    path = path.absolute()
    try:
        require_new(path, flag)
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        raise ConfigError(f"{flag}={str(path)!r}: cannot be made ({error.strerror}); give another folder") from error
    try:
        need = f"its disk has {free / 2**20:,.0f} MiB free, need {num_bytes / 2**20:,.0f} MiB"
        require_field(free >= num_bytes, flag, str(path), need, "make room, or give a folder on another disk")
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror}); make room or mend it, and start again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
