"""The files of a checkpoint that are no parameters, kept so that the same folder can be written again.

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

from ring_attention.checks import ConfigError, printable, require_field, shown
from ring_attention.models.hf.config import HFConfig, config_from_hf
from ring_attention.models.hf.files import inside, is_regular, read_json, require_regular
from ring_attention.models.hf.header import DTYPES, Entry, parse_header, read_header
from ring_attention.models.hf.names import Tensor, embedding_of, is_no_parameter, prefixes_of, tensors_of, tied_copy
from ring_attention.models.hf.source import CONFIG, Source

FOLDER = "hf"
"""Folder of a run or an import that holds the manifest."""

TOKENIZER = "tokenizer.json"

VERSION = 1
FILES = "files"
"""Folder in it that holds the small files of the checkpoint."""

_HEADERS, _TENSORS, _MANIFEST = "headers", "tensors", "manifest.json"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".npz")
_MOST_BYTES = 256 * 2**20
_COPY = "import the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The folder that holds what a checkpoint was besides its parameters.

    Attributes:
      path: the folder.
      shards: names of the safetensors files.
      others: relative paths of the other files.
      left_out: relative paths of files that were not kept: weights in another form, what is very large, and what is
        no file, such as a link that leads nowhere.
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
        """What `values` means to this library."""
        return config_from_hf(self.values)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the safetensors files, but for their headers."""
        return sum(entry.end for shard in self.shards for entry in list(self.entries(shard).values())[-1:])

    def other(self, name: str) -> Path:
        """Return the path of a file that is no safetensors file."""
        return self.path / FILES / name

    def header(self, shard: str) -> bytes:
        """The first bytes of a safetensors file, up to its data."""
        path = self.path / _HEADERS / shard
        require_regular(path, _COPY)
        return path.read_bytes()

    def entries(self, shard: str) -> dict[str, Entry]:
        """What a header says of the tensors, in the order of their data."""
        return parse_header(self.header(shard), self.path / _HEADERS / shard)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are parameters, by name, and a copy of a tied embedding that may stand beside it."""
        config = self.config
        prefixes = prefixes_of(config, (name for shard in self.shards for name in self.entries(shard)))
        tensors = tensors_of(config, prefixes)
        if config.model.tied_embeddings:
            copy = tied_copy(prefixes)
            tensors[copy] = dataclasses.replace(embedding_of(tensors), name=copy)
        return tensors

    def tensor(self, name: str) -> bytes:
        """The bytes of a tensor that is no parameter."""
        return (self.path / _TENSORS / name).read_bytes()


def write_manifest(source: Source, folder: Path) -> Manifest:
    """Copy what is needed to write `source` again, but for its parameters, into `folder`, which must not exist."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in (FILES, _HEADERS, _TENSORS):
        (partial / part).mkdir(parents=True)
    others, left_out = [], []
    for name in _others(source):
        path = source.path / name
        if not is_regular(path) or path.suffix in _WEIGHTS or path.stat().st_size > _MOST_BYTES:
            left_out.append(name)
        else:
            others.append(name)
            (partial / FILES / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / FILES / name)
    for shard in source.files:
        header = read_header(source.path / shard)
        (partial / _HEADERS / shard).write_bytes(header)
        with (source.path / shard).open("rb") as file:
            for name, entry in parse_header(header, source.path / shard).items():
                if is_no_parameter(name, source.config):
                    file.seek(len(header) + entry.begin)
                    (partial / _TENSORS / name).write_bytes(file.read(entry.end - entry.begin))
    values = {
        "version": VERSION,
        "shards": list(source.files),
        "others": others,
        "left_out": left_out,
        "digests": {name: _digest(partial / name) for name in _listing(partial)},
    }
    (partial / _MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)
    return read_manifest(folder)


def read_manifest(folder: Path) -> Manifest:
    """Open what `keep` wrote; ConfigError where it is damaged, of a newer version, or names what is not in it."""
    where, manifest = printable(str(folder)), folder / _MANIFEST
    values = read_json(manifest, _COPY)
    version = values.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ConfigError(f"{where}: version={shown(version)}: this ring_attention knows up to {VERSION}; update it")
    digests = values.get("digests")
    require_field(isinstance(digests, dict), f"{where}: digests", digests, "must be an object", _COPY)
    for name, digest in digests.items():
        path = inside(folder, name, said_by=manifest)
        if not is_regular(path) or _digest(path) != digest:
            raise ConfigError(f"{where}: {printable(name)} is not as it was written; {_COPY}")
    for key in ("shards", "others", "left_out"):
        named = values.get(key)
        require_field(isinstance(named, list), f"{where}: {key}", named, "must be a list", _COPY)
        if key != "left_out":  # which names what is not here
            for name in named:
                inside(folder, name, said_by=manifest)
    manifest = Manifest(folder, *(tuple(values[key]) for key in ("shards", "others", "left_out")))
    for path in map(manifest.other, manifest.others):
        require_regular(path, _COPY)
    twice = len({*manifest.shards, *manifest.others}) < len(manifest.shards) + len(manifest.others)
    require_field(not twice, f"{where}: shards", list(manifest.shards), "a file is named twice", _COPY)
    _require_tensors(manifest)
    return manifest


def _require_tensors(manifest: Manifest) -> None:
    """Raise ConfigError unless the headers name just the tensors that config.json asks for, in their shapes."""
    config, missing = manifest.config, manifest.tensors
    where = printable(str(manifest.path))
    for shard in manifest.shards:
        for name, entry in manifest.entries(shard).items():
            if is_no_parameter(name, config):
                path = manifest.path / _TENSORS / name
                fits = is_regular(path) and path.stat().st_size == entry.end - entry.begin
            else:
                tensor = missing.pop(name, None)
                fits = tensor is not None and entry.shape == tensor.shape and entry.dtype in DTYPES
            if not fits:
                raise ConfigError(f"{where}: tensor {printable(name)} is none of the model of {CONFIG}; {_COPY}")
    required = [name for name in missing if name in tensors_of(config, prefixes_of(config, manifest.tensors))]
    if required:
        raise ConfigError(f"{where}: tensor {required[0]} is missing; {_COPY}")


def _others(source: Source) -> Iterator[str]:
    """Relative paths of the files that hold no parameters; hidden ones, such as .git, are not the checkpoint's."""
    for folder, folders, names in os.walk(source.path):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # which may form circles
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names + links):
            relative = Path(folder, name).relative_to(source.path)
            if not name.startswith(".") and str(relative) not in source.files:
                yield str(relative)


def _listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
