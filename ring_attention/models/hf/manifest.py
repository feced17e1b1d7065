"""What is kept of a checkpoint's folder beside its parameters, so that the same folder can be written again.

A folder `hf/` with the small files as they were (config.json, the tokenizer, the index of the shards), the header of
each safetensors file, the few tensors that are no parameters, and manifest.json, which lists them with their digests.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ring_attention.checks import ConfigError, printable
from ring_attention.models.hf.config import HFConfig, config_from_hf, read_json
from ring_attention.models.hf.names import is_no_parameter
from ring_attention.models.hf.source import CONFIG, Source, read_header

FOLDER = "hf"
"""Of a run or an import: where the manifest lies."""

TOKENIZER = "tokenizer.json"

VERSION = 1
FILES = "files"
"""In it: the small files of the checkpoint."""

_HEADERS, _TENSORS, _MANIFEST = "headers", "tensors", "manifest.json"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".npz")
_MOST_BYTES = 256 * 2**20
_COPY = "import the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A folder of what was kept.

    Attributes:
      path: of the folder.
      shards: names of the safetensors files.
      others: relative paths of the other files.
      left_out: relative paths of files that were not kept: weights in another form, and what is very large.
    """

    path: Path
    shards: tuple[str, ...]
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def values(self) -> dict[str, Any]:
        """The contents of the source's config.json."""
        return read_json(self.other(CONFIG))

    @property
    def config(self) -> HFConfig:
        """What they mean."""
        return config_from_hf(self.values)

    @property
    def tensor_bytes(self) -> int:
        """Of the safetensors files, but for their headers."""
        return sum(end - begin for shard in self.shards for begin, end in offsets(self.header(shard)).values())

    def other(self, name: str) -> Path:
        """Where a file lies that is no safetensors file."""
        return self.path / FILES / name

    def header(self, shard: str) -> bytes:
        """The first bytes of a safetensors file, up to its data."""
        return (self.path / _HEADERS / shard).read_bytes()

    def tensor(self, name: str) -> bytes:
        """The bytes of a tensor that is no parameter."""
        return (self.path / _TENSORS / name).read_bytes()


def keep(source: Source, folder: Path) -> Kept:
    """Copy what must be kept of `source` into `folder`, which must not exist."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in (FILES, _HEADERS, _TENSORS):
        (partial / part).mkdir(parents=True)
    others, left_out = [], []
    for name in _others(source):
        path = source.path / name
        if path.suffix in _WEIGHTS or path.stat().st_size > _MOST_BYTES:
            left_out.append(name)
        else:
            others.append(name)
            (partial / FILES / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / FILES / name)
    for shard in source.files:
        header = read_header(source.path / shard)
        (partial / _HEADERS / shard).write_bytes(header)
        with (source.path / shard).open("rb") as file:
            for name, (begin, end) in offsets(header).items():
                if is_no_parameter(name):
                    file.seek(len(header) + begin)
                    (partial / _TENSORS / name).write_bytes(file.read(end - begin))
    values = {
        "version": VERSION,
        "shards": list(source.files),
        "others": others,
        "left_out": left_out,
        "digests": {name: _digest(partial / name) for name in _listing(partial)},
    }
    (partial / _MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)
    return open_kept(folder)


def open_kept(folder: Path) -> Kept:
    """Open what `keep` wrote; ConfigError where it is damaged or of a newer version."""
    where = printable(str(folder))
    values = read_json(folder / _MANIFEST)
    version = values.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ConfigError(f"{where}: version={version!r}: this ring_attention knows up to {VERSION}; update it")
    for name, digest in values["digests"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise ConfigError(f"{where}: {printable(name)} is not as it was written; {_COPY}")
    return Kept(folder, *(tuple(values[key]) for key in ("shards", "others", "left_out")))


def offsets(header: bytes) -> dict[str, tuple[int, int]]:
    """Where each tensor lies in a safetensors file's data, in their order there."""
    entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
    return {
        name: tuple(entries[name]["data_offsets"]) for name in sorted(entries, key=lambda n: entries[n]["data_offsets"])
    }


def _others(source: Source) -> Iterator[str]:
    """Relative paths of the files that hold no parameters; hidden ones, such as .git, are not the checkpoint's."""
    for folder, folders, names in os.walk(source.path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            relative = Path(folder, name).relative_to(source.path)
            if not name.startswith(".") and str(relative) not in source.files:
                yield str(relative)


def _listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
