"""From the files of a checkpoint straight into sharded arrays, a tensor at a time.

A parameter with an axis of layers is made on the devices and filled layer by layer in place. So the host holds, beyond
the arrays themselves where those are the host's, one tensor as it is read; each process reads what its devices hold.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_attention.checks import ConfigError, printable, require_choice
from ring_attention.models.hf.names import Part, embedding_of
from ring_attention.models.hf.source import CONFIG, Source, all_finite, expected
from ring_attention.models.transformer import parameter_specs
from ring_attention.parallel.sharding import check_fits, stored_shape

Progress = Callable[[str, int], None]
"""progress(tensor, bytes): called after each tensor, with its name and its size in the files."""

_BAND = 32 * 2**20  # numbers compared at a time


def load_parameters(source: Source, mesh: Mesh, dtype: str = "float32", progress: Progress | None = None) -> Any:
    """The parameters of a checkpoint, a nested dict sharded over `mesh` as `parameter_specs` says.

    Args:
      source: of `open_source`.
      mesh: whose devices will hold them. Every process of a run calls this.
      dtype: of the arrays, "float32" or "bfloat16", whatever the files hold.
      progress: told of each tensor.

    Raises:
      ConfigError: if the mesh does not divide the model, a file is damaged, or a tensor holds a number that is not
        finite.
    """
    require_choice("dtype", dtype, ("float32", "bfloat16"))
    _require_fit(source, mesh)
    specs = flatten_dict(parameter_specs(source.config.transformer), sep=".")
    groups: dict[str, list[tuple[str, Part]]] = {}
    for tensor in expected(source).values():
        for part in tensor.parts:
            groups.setdefault(part.parameter, []).append((tensor.name, part))
    params = {}
    for parameter in sorted(groups, key=lambda name: -np.prod(groups[name][0][1].shape)):  # while there is most room
        load = functools.partial(_load, source, mesh, specs[parameter], dtype, progress or (lambda name, size: None))
        params[parameter] = load(groups[parameter])
    if source.tied_copy in source.stored and source.config.model.tied_embeddings:
        _require_tied(source)
    return unflatten_dict(params, sep=".")


def _require_fit(source: Source, mesh: Mesh) -> None:
    model, shape = source.config.model, dict(mesh.shape)
    sizes = {
        "num_attention_heads": (model.num_heads, "heads"),
        "num_key_value_heads": (model.num_kv_heads, "kv_heads"),
        "intermediate_size": (model.ffn_dim, "ffn"),
        "vocab_size": (model.vocab_size, "vocab"),
    }
    try:
        for key, (size, axis) in sizes.items():
            check_fits(key, size, axis, shape)
    except ValueError as error:
        raise ConfigError(f"{printable(str(source.path / CONFIG))}: {error}") from error


def _load(
    source: Source, mesh: Mesh, spec: PartitionSpec, dtype: str, progress: Progress, parts: list[tuple[str, Part]]
):
    """One parameter, from the tensors of its layers or its only one."""

    def read(name: str, part: Part, spec: PartitionSpec) -> jax.Array:
        array = _place(source, name, part, NamedSharding(mesh, spec), dtype)
        progress(name, source.stored[name].num_bytes * part.shape[0] // source.stored[name].shape[0])
        return array

    if parts[0][1].layer is None:
        return read(*parts[0], spec)
    shape = stored_shape((len(parts), *parts[0][1].parameter_shape), spec, mesh.shape)
    array = _zeros_on(shape, dtype, NamedSharding(mesh, spec))()
    for name, part in parts:
        array = _fill(array, read(name, part, PartitionSpec(*spec[1:])), part.layer).block_until_ready()
    return array


@functools.cache
def _zeros_on(shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Callable[[], jax.Array]:
    """Make zeros where they will live; compiled once for parameters that are alike."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _fill(array: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, layer, index, 0)


def _place(source: Source, name: str, rows: Part, sharding: NamedSharding, dtype: str) -> jax.Array:
    """Rows of a tensor on the devices: each part is read once, however many devices hold it."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    shape = stored_shape(rows.parameter_shape, sharding.spec, sharding.mesh.shape)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    shards = []
    with source.reading(name) as read:
        for bounds, holders in devices.items():
            sizes = zip(bounds, rows.parameter_shape, strict=True)
            part = read(rows.slices(tuple(slice(min(start, n), min(stop, n)) for (start, stop), n in sizes)))
            part = rows.to_parameter(part).astype(dtype, order="C")
            missing = [(0, stop - start - n) for (start, stop), n in zip(bounds, part.shape, strict=True)]
            part = np.pad(part, missing) if any(map(any, missing)) else part
            _require_finite(source, name, part)
            shards += [jax.device_put(part, device) for device in holders]
    array = jax.make_array_from_single_device_arrays(shape, sharding, shards)
    return array.block_until_ready()


def _require_finite(source: Source, name: str, part: np.ndarray) -> None:
    if not all_finite(part):
        path = source.path / source.stored[name].file
        need = "holds numbers that are not finite; download it again"
        raise ConfigError(f"{printable(str(path))}: tensor {printable(name)} {need}")


def _require_tied(source: Source) -> None:
    """Raise ConfigError unless the copy of a tied embedding equals it; a band of rows at a time."""
    embedding, copy = embedding_of(expected(source)), source.tied_copy
    rows, width = embedding.shape
    step = max(1, _BAND // width)
    for row in range(0, rows, step):
        band = slice(row, min(row + step, rows))
        parts = []
        for name in (embedding.name, copy):
            with source.reading(name) as read:
                parts.append(read((band, slice(0, width))))
        if not np.array_equal(*parts):
            path = source.path / source.stored[copy].file
            what = f"is not {embedding.name}, though tie_word_embeddings is true"
            raise ConfigError(f"{printable(str(path))}: tensor {copy} {what}; set that to false in {CONFIG}")
