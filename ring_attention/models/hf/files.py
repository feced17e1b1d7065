"""Files of folders that others made: read only where they are files, named only inside their folder."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from ring_attention.checks import ConfigError, one_line, printable, shown

MOST_JSON_BYTES = 256 * 2**20
"""Bytes of a file of JSON: ten times the index of the largest checkpoint that is published."""

_LONGEST_NAME = 255  # bytes, as file systems have it


def inside(folder: Path, name: Any, *, said_by: Path | str) -> Path:
    """The path below `folder` that a file names.

    Raises:
      ConfigError: in one line that begins with `said_by`, the file, for what is no relative path without "..", and for
        names that no file system has. Links are not followed: they are the folder's, as in a cache of downloads.
    """
    if not (isinstance(name, str) and _is_below(name)):
        need = "must name a file below its folder"
        raise ConfigError(f"{printable(str(said_by))}: {shown(name)} {need}; take the folder from where it was made")
    return folder / name


def _is_below(name: str) -> bool:
    """Whether every part of a path is the name of something in the folder before it."""
    try:
        parts = os.fsencode(name).split(b"/")  # pathlib would drop empty parts and "."
    except ValueError:  # half a surrogate pair
        return False
    return all(part not in (b"", b".", b"..") and b"\0" not in part and len(part) <= _LONGEST_NAME for part in parts)


def is_regular(path: Path) -> bool:
    """Whether a path leads to a file with an end: no folder, pipe or device, no broken link, no impossible name."""
    return os.path.isfile(path)  # False where the system call fails


def require_regular(path: Path, remedy: str = "give a folder that holds it") -> None:
    """Raise ConfigError unless `is_regular`: to open a pipe may wait for ever, and a device may have no end."""
    if not is_regular(path):
        reason = "it is no regular file" if os.path.lexists(path) else os.strerror(errno.ENOENT)
        raise ConfigError(f"{printable(str(path))} cannot be read ({reason}); {remedy}")


def require_regular_tree(folder: Path, remedy: str) -> None:
    """Raise ConfigError unless everything below `folder` is a folder or `is_regular`."""
    for path, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]  # which may lead anywhere
        for name in names + links:
            require_regular(Path(path, name), remedy)


def read_json(path: Path, remedy: str = "download it again", *, kind: str = "JSON") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ConfigError: where there is none, in a line that says that the file is not `kind`, with `remedy`.
    """
    require_regular(path)
    where = printable(str(path))
    try:
        size = path.stat().st_size
        if size > MOST_JSON_BYTES:
            raise ConfigError(f"{where} has {size:,} bytes, need at most {MOST_JSON_BYTES:,}; {remedy}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}); give a folder that holds it") from error
    except ConfigError:
        raise
    except ValueError as error:  # JSON's and Unicode's
        raise ConfigError(f"{where} is not {kind} ({one_line(error)}); {remedy}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply; {remedy}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds {shown(values)}, need an object; {remedy}")
    return values
