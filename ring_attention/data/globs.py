"""Globs, expanded so that no loop of symbolic links and no pipe or device can hold a run up."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator

from ring_attention.checks import printable, require_field

ANY_DEPTH = "**"


def matching_files(paths: str) -> list[tuple[str, str]]:
    """List (name, path) of the files that match any of the globs in `paths`, each file once.

    A name is a path below the fixed part of its glob. Only regular files, and links to them, match. Raises ConfigError
    for a glob that no file matches.
    """
    found = {}
    for pattern in filter(None, (pattern.strip() for pattern in paths.split(","))):
        matches = _matches(pattern)
        require_field(bool(matches), "data.paths", paths, f"no file matches {pattern!r}", _remedy(pattern))
        for name, path in matches:
            found.setdefault(os.path.realpath(path), (name, path))
    return list(found.values())


def _remedy(pattern: str) -> str:
    """Return what to do about a glob that no file matches."""
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        return f"it is a directory, write {pattern.rstrip(os.sep) + '/**/*.txt'!r}"
    if os.path.exists(path):
        return "it is a pipe or a device, copy what comes from it into a file"
    return f"looked from {printable(os.getcwd())}, check the spelling"


def _matches(pattern: str) -> list[tuple[str, str]]:
    """List (name, path) of the files that match one glob, sorted."""
    root, relative = _fixed_part(os.path.expanduser(pattern))
    try:
        names = sorted(set(_expand(root, "", relative.split(os.sep))))
    except ValueError:  # a NUL byte, or half a surrogate pair: no file is called that
        return []
    return [(name, os.path.join(root, name)) for name in names if os.path.isfile(os.path.join(root, name))]


def _expand(root: str, base: str, parts: list[str]) -> Iterator[str]:
    """Yield the paths below `root` that begin with `base` and whose further parts match `parts`."""
    part, *rest = parts
    if part == ANY_DEPTH and not rest:  # as glob has it, "a/**" matches the files below a as well
        rest = ["*"]
    if part == ANY_DEPTH:
        for folder in _folders_below(root, base, set()):
            yield from _expand(root, folder, rest)
    elif not glob.has_magic(part):
        path = os.path.join(base, part)
        if os.path.lexists(os.path.join(root, path)):
            yield from _expand(root, path, rest) if rest else [path]
    else:
        fits = re.compile(fnmatch.translate(os.path.normcase(part))).match
        for name in _names_in(os.path.join(root, base)):
            if fits(os.path.normcase(name)) and (part.startswith(".") or not name.startswith(".")):
                path = os.path.join(base, name)
                yield from _expand(root, path, rest) if rest else [path]


def _folders_below(root: str, folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Yield `folder` and all folders below it but hidden ones, in order, each once whatever links lead to it."""
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder) or os.curdir
        try:
            status = os.stat(path)
        except OSError:  # gone meanwhile, or a link that leads round in a circle
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        names = [name for name in _names_in(path) if not name.startswith(".")]
        below = [os.path.join(folder, name) for name in names if os.path.isdir(os.path.join(path, name))]
        waiting += reversed(below)


def _names_in(folder: str) -> list[str]:
    """Return the names in a folder, sorted; [] where there is none that may be listed."""
    try:
        return sorted(os.listdir(folder or os.curdir))
    except OSError:
        return []


def _fixed_part(pattern: str) -> tuple[str, str]:
    """Cut a glob into the directory before its first wildcard, and the rest."""
    *directories, last = pattern.split(os.sep)
    fixed = next((i for i, part in enumerate(directories) if glob.has_magic(part)), len(directories))
    root = os.sep.join(directories[:fixed])
    if fixed and not root:
        root = os.sep
    return root, os.sep.join([*directories[fixed:], last])
