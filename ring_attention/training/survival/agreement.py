"""Processes of one run that were started alike, or say in which field they differ before the first step.

Each compares what it was given with what process 0 was, through the key-value store of JAX's coordination service. The
first that differs ends with a line, which `Peers` tells the others.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax._src import distributed  # the store has no public name; `peers.py` takes it from here, too

from ring_attention.checks import ConfigError, shown
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import config_to_dict

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")
"""Whose versions decide what is computed or read."""

SETTINGS = (
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion"),
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
)
"""Of JAX: what the environment of one machine may set otherwise."""

_PATIENCE = 2000
"""Milliseconds that the store is asked at a time; between them Ctrl-C is heard."""

_FIELDS_SHOWN = 5


def require_agreement(topic: str, fields: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError unless `fields` are those of process 0; every process calls it alike. Alone, nothing happens.

    Args:
      topic: what is compared, one call each.
      fields: name -> value, fit for JSON.
      remedy: what to do about a difference.
    """
    runtime = distributed.global_state
    if runtime.num_processes in (None, 1):
        return
    if runtime.process_id == 0:
        runtime.client.key_value_set(f"ring_attention/agreement/{topic}", json.dumps(fields))
        return
    theirs = json.loads(_wait_for(f"ring_attention/agreement/{topic}"))
    ours = json.loads(json.dumps(fields))
    differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if not differing:
        return
    name, *others = differing
    more = f" (and {', '.join(others[:_FIELDS_SHOWN])}{' ...' if others[_FIELDS_SHOWN:] else ''})" if others else ""
    raise ConfigError(
        f"{name}={shown(ours.get(name))}{more}: so in process {runtime.process_id}, and in process 0 it is "
        f"{shown(theirs.get(name))}; {remedy}"
    )


def program_fields(config: TrainConfig) -> dict[str, Any]:
    """The resolved config, field by field, and the versions of what runs it."""
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    settings = {name: str(jax.config.values.get(name)) for name in SETTINGS}
    fields = flatten_dict(config_to_dict(config), sep=".")
    return (
        fields
        | {f"version of {name}": words for name, words in versions.items()}
        | settings
        | {"digest of ring_attention's source": source_digest()}
    )


def source_digest() -> str:
    """Hash this package's own source: two checkouts may share a version."""
    root, hashed = Path(__file__).parents[2], hashlib.blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        hashed.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return hashed.hexdigest()


def _wait_for(key: str) -> str:
    """What process 0 writes under `key`; `Peers` ends this process if that one is gone."""
    while True:
        try:
            return distributed.global_state.client.blocking_key_value_get(key, _PATIENCE)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
