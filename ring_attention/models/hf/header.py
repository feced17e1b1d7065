"""The first bytes of a safetensors file: the header's length, and its JSON."""

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ring_attention.checks import ConfigError, is_whole, printable

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""Dtypes of weights, as safetensors names them."""

MOST_BYTES = 100_000_000
"""The longest header, as the safetensors library has it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a header: its dtype as safetensors names it, its shape, and where it lies in the file's data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> bytes:
    """The first bytes of a safetensors file, up to its data, as they stand.

    Raises:
      ConfigError: if the length is cut off, or beyond what a header has.
    """
    with path.open("rb") as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else MOST_BYTES + 1
        if size > MOST_BYTES:
            raise ConfigError(
                f"{printable(str(path))} has no header of at most {MOST_BYTES:,} bytes; download it again"
            )
        return length + file.read(size)


def parse_header(header: bytes, where: Path) -> dict[str, Entry]:
    """The tensors of a header, in the order of their data, which follow one another without a hole.

    Raises:
      ConfigError: in a line that names `where`, for what is no such header.
    """
    try:
        values = json.loads(header[8:])
        whole = struct.unpack("<Q", header[:8])[0] == len(header) - 8
    except (struct.error, ValueError, RecursionError):
        values, whole = None, False
    entries = {}
    if isinstance(values, dict) and whole:
        entries = {name: _entry(value) for name, value in values.items() if name != "__metadata__"}
    found = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end) if item[1] else (0, 0))
    ends = [0, *(entry.end for _, entry in found if entry)]
    good = bool(found) and all(entry and entry.begin == ends[i] for i, (_, entry) in enumerate(found))
    if not good:
        raise ConfigError(f"{printable(str(where))} is no header of safetensors; import the checkpoint again")
    return dict(found)


def _entry(value: Any) -> Entry | None:
    """What an entry says; None where it says nothing that can be."""
    if not isinstance(value, dict):
        return None
    dtype, shape, place = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    fits = isinstance(dtype, str) and isinstance(shape, list) and isinstance(place, list) and len(place) == 2
    if not fits or not all(is_whole(size, 0) and size < 2**63 for size in [*shape, *place]):
        return None
    entry = Entry(dtype, tuple(shape), *place)
    size = math.prod(entry.shape) * DTYPES[dtype].itemsize if dtype in DTYPES else entry.end - entry.begin
    return entry if entry.begin >= 0 and size == entry.end - entry.begin else None
