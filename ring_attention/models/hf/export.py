"""From sharded arrays to the files of a checkpoint, a tensor at a time."""

import json
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ring_attention.checks import ConfigError, printable, require_field
from ring_attention.models.hf.config import HFConfig, config_to_hf, update_hf
from ring_attention.models.hf.files import inside
from ring_attention.models.hf.header import DTYPES, parse_header
from ring_attention.models.hf.loading import Progress
from ring_attention.models.hf.manifest import Manifest
from ring_attention.models.hf.names import Tensor, leaf, tensors_of
from ring_attention.models.hf.source import CONFIG, INDEX, SINGLE, all_finite

SHARD_BYTES = 5 * 10**9
"""Most bytes of a file in the standard layout, as `save_pretrained` cuts them."""

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def numpy_dtype(name: str) -> np.dtype:
    """The dtype that a key of DTYPE_NAMES stands for."""
    return DTYPES[DTYPE_NAMES[name]]


def write_again(manifest: Manifest, params: Any, config: HFConfig, out: Path, progress: Progress) -> None:
    """Write the folder that `manifest` was made of, with the values of `params`.

    Every file has the names, the order, the dtypes and the bytes that it had, but for the values, and for config.json
    where `config` is another. With the values that were read, all bytes are the same.

    Args:
      manifest: of `manifest.read_manifest`.
      params: the parameters, float32.
      config: of the model that they are of.
      out: folder that exists and is empty.
      progress: told of each tensor.
    """
    for name in manifest.others:
        target = inside(out, name, said_by=manifest.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(manifest.other(name), target)
    values = manifest.values
    updated = update_hf(values, config)
    if updated != values:
        _write_json(out / CONFIG, updated)
    tensors = manifest.tensors
    for shard in manifest.shards:
        header = manifest.header(shard)
        target = inside(out, shard, said_by=manifest.path)
        _write(target, header, _contents(header, target, manifest, tensors, params), progress)


def write_standard(
    params: Any,
    config: HFConfig,
    dtype: str,
    out: Path,
    progress: Progress,
    *,
    extra: dict[str, Any],
    most: int = SHARD_BYTES,
) -> None:
    """Write config.json and safetensors files of at most `most` bytes, as `save_pretrained` of transformers lays them.

    Args:
      params: the parameters, float32.
      config: of the model.
      dtype: of the values, a key of DTYPE_NAMES.
      out: folder that exists and is empty.
      progress: told of each tensor.
      extra: further keys of config.json.
      most: bytes of a file; a single tensor may be more.
    """
    _write_json(out / CONFIG, config_to_hf(config) | {"torch_dtype": dtype} | extra)
    shards = _cut(tensors_of(config), numpy_dtype(dtype).itemsize, most)
    places, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = _header(shard, DTYPE_NAMES[dtype])
        _write(out / name, header, _contents(header, out / name, None, shard, params), progress)
        places |= dict.fromkeys(shard, name)
        total += sum(entry.end - entry.begin for entry in parse_header(header, out / name).values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(out / INDEX, index)


def host_array(array: jax.Array, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of it, on the host; only that is fetched. For one process."""
    shape = array.shape if layer is None else array.shape[1:]
    whole = np.empty(shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            index, data = (shard.index, shard.data) if layer is None else (shard.index[1:], shard.data[layer])
            whole[index] = np.asarray(data)
    return whole


def _contents(
    header: bytes, path: Path, manifest: Manifest | None, tensors: dict[str, Tensor], params: Any
) -> Iterator[tuple[str, bytes | memoryview]]:
    """The name and the bytes of each tensor of the file at `path`, in their order there."""
    for name, entry in parse_header(header, path).items():
        if name not in tensors and manifest is not None:
            yield name, manifest.tensor(name)
            continue
        parts = [part.to_tensor(host_array(leaf(params, part.parameter), part.layer)) for part in tensors[name].parts]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        dtype = DTYPES[entry.dtype]
        with np.errstate(over="ignore"):
            stored = values.astype(dtype, order="C")
        if not all_finite(stored):
            need = f"does not fit {dtype.name}"
            raise ConfigError(
                f"tensor {printable(name)} {need}: its largest value is {np.abs(values).max():g}; train it anew"
            )
        yield name, memoryview(stored.reshape(-1).view(np.uint8))


def _write(path: Path, header: bytes, contents: Iterable[tuple[str, bytes | memoryview]], progress: Progress) -> None:
    with path.open("wb") as file:
        file.write(header)
        for name, data in contents:
            file.write(data)
            progress(name, len(data))


def _header(tensors: dict[str, Tensor], dtype: str) -> bytes:
    """The first bytes of a file with these tensors one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + int(np.prod(tensor.shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _cut(tensors: dict[str, Tensor], itemsize: int, most: int) -> list[dict[str, Tensor]]:
    """Share tensors out over files of at most `most` bytes, in their order."""
    require_field(most > 0, "shard_bytes", most, "must be positive", "leave it out to take the default")
    shards: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape, dtype=np.int64)) * itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= size
    return shards


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
