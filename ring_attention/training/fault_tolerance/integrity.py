"""Whether the files of a checkpoint are those that were written, asked before orbax opens them.

Orbax and tensorstore believe their files: one changed byte of an index of chunks may ask for tens of GiB of memory, or
leave coroutines that complain when the process ends. So a checkpoint lists its files with their sizes and digests, and
they are compared first. Checkpoints from before there were such lists hold the fingerprints of their arrays alone.
"""

import errno
import functools
import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.checks import ConfigError, shown
from ring_attention.models.hf.files import inside, read_json
from ring_attention.parallel.host_memory import on_device

MANIFEST = "files.json"
"""Name of the list of the files below STATE, in a checkpoint's folder."""

STATE = "state"
"""Name of the folder of the arrays, in a checkpoint's folder."""

NOT_ITS_FAULT = (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES)
"""Numbers of errors of a file system that is away; the files may be whole."""

_CONTENTS = os.path.join("data", "metadata")  # as orbax's handler for JSON names it
_THREADS = 8

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: places get distinct words


class DamagedError(Exception):
    """A checkpoint is not what was saved; the message says where it lies and what is wrong with it."""


def sign(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values`, which JSON can hold, with their own digest added as "digest"."""
    return values | {"digest": _digest_of(values)}


def write_manifest(checkpoint: Path) -> None:
    """List the files below the state of a checkpoint that is complete but for that list."""
    names = sorted(
        os.path.relpath(os.path.join(folder, name), checkpoint)
        for folder, _, names in os.walk(checkpoint / STATE)
        for name in names
    )
    with ThreadPoolExecutor(_THREADS) as threads:
        files = dict(zip(names, threads.map(lambda name: _describe(checkpoint / name), names), strict=True))
    (checkpoint / MANIFEST).write_text(json.dumps(sign({"files": files})), encoding="utf-8")


def read_contents(checkpoint: Path) -> dict[str, Any]:
    """Return what was saved beside the arrays: "data", "fingerprints", and "files" where the files are listed.

    Raises:
      DamagedError: if it is not as it was written.
      OSError: if the file system refuses.
    """
    return _read_signed(checkpoint, _CONTENTS, "the position in the data is not as it was written")


def require_written(checkpoint: Path, contents: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Compare the files below the state with the list of them, if there is one.

    Args:
      checkpoint: its folder.
      contents: what `read_contents` returned.
      part: the share of the files to compare, out of `parts`: where several processes read, each does its own.
      parts: how many shares there are.

    Raises:
      DamagedError: if one of them is not what was written; names it.
      OSError: if the file system refuses.
    """
    if "files" not in contents:
        return
    files = _read_signed(checkpoint, MANIFEST, f"{MANIFEST} is not as it was written")["files"]
    if not isinstance(files, dict):
        raise DamagedError(f"{checkpoint} is damaged: {MANIFEST} lists no files")
    names = sorted(files)[part::parts]
    with ThreadPoolExecutor(_THREADS) as threads:
        same = list(threads.map(lambda name: _is_same(checkpoint, name, files[name]), names))
    if not all(same):
        name = names[same.index(False)]
        raise DamagedError(f"{checkpoint} is damaged: {shown(name)} is not as it was written")


def _is_same(checkpoint: Path, name: str, wanted: Any) -> bool:
    try:
        path = inside(checkpoint, name, said_by=checkpoint / MANIFEST)
    except ConfigError:
        return False
    return _is_regular(path) and _has_size(path, wanted) and _describe(path) == wanted


def _has_size(path: Path, wanted: Any) -> bool:
    """Return whether the size is as written: asked first, so that nothing larger than that is read."""
    return isinstance(wanted, list) and wanted[:1] == [os.path.getsize(path)]


def _is_regular(path: Path) -> bool:
    """Return whether a path leads to a file with an end; OSError where the file system cannot say."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in NOT_ITS_FAULT:
            raise
        return False


def _describe(path: Path) -> list[Any]:
    """Return [bytes, digest] of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return [os.fstat(file.fileno()).st_size, digest]


def _read_signed(checkpoint: Path, name: str, words: str) -> dict[str, Any]:
    """Return a file of JSON without its digest; DamagedError with `words` unless it is what was signed."""
    damaged = DamagedError(f"{checkpoint} is damaged: {words}")
    if not _is_regular(checkpoint / name):
        raise damaged
    try:
        values = read_json(checkpoint / name)
    except ConfigError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise damaged from error
    digest = values.pop("digest", None)
    if digest is None or digest != _digest_of(values):
        raise damaged
    return values


def _digest_of(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def fingerprints(tree: Any, whole: Any = None) -> dict[str, int]:
    """Return the fingerprint of each array of a pytree, by dotted name.

    Computed on the devices, each its shards; every process of a run must call it. Where arrays are padded at the ends
    of their axes, `whole` is a pytree of the shapes that count, so that the fingerprint is that of any padding.
    """
    shapes = tuple(x.shape for x in jax.tree.leaves(tree if whole is None else whole))
    words = jax.device_get(_fingerprints(jax.tree.leaves(tree), shapes))
    return {name: int(word) for name, word in zip(leaf_names(tree), words, strict=True)}


def leaf_names(tree: Any) -> list[str]:
    """Name the leaves of a pytree by their paths, as in "params.layers.attention.query"."""
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)]


@functools.partial(jax.jit, static_argnums=1)
def _fingerprints(arrays: list[jax.Array], shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    return [_fingerprint(on_device(x), shape) for x, shape in zip(arrays, shapes, strict=True)]


def _fingerprint(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    words, place, counts = _words(x), jnp.uint32(0), True
    for axis, size in enumerate((*shape, *_words(x).shape[len(shape) :])):
        index = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(size) + index
        counts = counts if size >= words.shape[axis] else counts & (index < size)
    mixed = _mix(words ^ (place * jnp.uint32(GOLDEN)))
    return jnp.sum(mixed if counts is True else jnp.where(counts, mixed, 0), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """Return the bits of `x` as uint32: one word for an element of up to four bytes, several for longer ones."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    """Mix 32-bit words by the finalizer of MurmurHash3, a bijection in which every bit depends on every other."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
