"""A trained model in a folder: its config, and its parameters on the devices of any mesh.

The folder is that of a run of train.py, of an import (scripts/import_hf.py), or of a Hugging Face checkpoint itself.
"""

import dataclasses
import functools
import gc
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from ring_attention.checks import ConfigError, one_line, require_field, require_local
from ring_attention.data.config import DataConfig
from ring_attention.data.tokenizers import BYTES
from ring_attention.models.config import ModelConfig
from ring_attention.models.hf.config import HFConfig
from ring_attention.models.hf.files import is_regular, require_regular_tree
from ring_attention.models.hf.loading import Progress, load_parameters
from ring_attention.models.hf.manifest import FILES, FOLDER, TOKENIZER, Manifest, read_manifest
from ring_attention.models.hf.source import Source, is_hf_folder, open_source
from ring_attention.models.transformer import abstract_parameters, parameter_specs
from ring_attention.training.checkpoints import written_steps
from ring_attention.training.config import AttentionConfig, OptimizerConfig, TrainConfig
from ring_attention.training.fault_tolerance.integrity import DamagedError, fingerprints, read_contents, require_written
from ring_attention.training.run_folder import RunFolder, read_config

_NEED = (
    "give the folder of a run or one of its checkpoints (runs/NAME, runs/NAME/checkpoints/200), or one of Hugging Face"
)

_GARBAGE = 2**28
"""Bytes of copies after which garbage is collected."""


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model in a folder.

    Attributes:
      checkpoint: the folder that holds its parameters.
      config: the config of the run that made it; of a Hugging Face checkpoint, as far as that says.
      source: the Hugging Face checkpoint, where `checkpoint` is one.
    """

    checkpoint: Path
    config: TrainConfig
    source: Source | None = None

    def load(self, mesh: Mesh, dtype: str = "float32", progress: Progress | None = None) -> Any:
        """Read the parameters: a nested dict of arrays of `dtype`, sharded as `parameter_specs` says.

        `progress` is told of each tensor of a Hugging Face checkpoint.

        Raises:
          ConfigError: if the checkpoint does not hold this model, or is not as it was written.
        """
        if self.source is not None:
            return load_parameters(self.source, mesh, dtype, progress)
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(self.config.transformer))
        wanted = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract_parameters(self.config.transformer, mesh.shape),
            shardings,
        )
        params = _read(self.checkpoint, wanted, abstract_parameters(self.config.transformer))
        if jnp.dtype(dtype) == jnp.float32:
            return params
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree), out_shardings=shardings)
        return cast(params)

    @property
    def manifest(self) -> Manifest | None:
        """The files of the Hugging Face checkpoint that an import, or a run that began with one, came from; or None."""
        if self.source is not None:
            return None
        folder = self.checkpoint.parents[1] / FOLDER
        return read_manifest(folder) if os.path.isdir(folder) else None

    @property
    def model(self) -> ModelConfig:
        """The shape of the model."""
        return self.config.model


def open_trained_model(path: str) -> TrainedModel:
    """Find the newest checkpoint of a run, or the one that `path` names, and the config beside it; reads no arrays.

    Where the tokenizer of the config is gone, as when an import was moved, the copy that the import holds is named.

    Raises:
      ConfigError: if there is none.
    """
    require_local("checkpoint", path)
    folder = Path(path)
    if is_hf_folder(folder):
        source = open_source(folder)
        return TrainedModel(folder, config_of(folder, source.config), source)
    chosen = folder if folder.parent.name == "checkpoints" else None
    run = RunFolder(folder.parents[1] if chosen else folder)
    require_field(is_regular(run.config), "checkpoint", path, "has no config.json", _NEED)
    if chosen is None:
        steps = written_steps(run.checkpoints)
        require_field(bool(steps), "checkpoint", path, "holds no checkpoint yet", "wait for the first, or train on")
        chosen = run.checkpoints / str(steps[-1])
    require_field(os.path.isdir(chosen / "state"), "checkpoint", path, "is no checkpoint", _NEED)
    return TrainedModel(chosen, _with_tokenizer(read_config(run), run))


def config_of(folder: Path, config: HFConfig) -> TrainConfig:
    """Return the config that a run that made this Hugging Face checkpoint would have had, as far as that says."""
    return TrainConfig(
        name=folder.absolute().name,
        model=config.model,
        seq_len=config.max_len,
        num_steps=1,
        attention=AttentionConfig(**config.attention_fields),
        data=DataConfig(tokenizer=str(folder.absolute() / TOKENIZER)),
        optimizer=OptimizerConfig(warmup_steps=0),
    )


def _with_tokenizer(config: TrainConfig, run: RunFolder) -> TrainConfig:
    copy = run.path.absolute() / FOLDER / FILES / TOKENIZER
    if config.data.tokenizer == BYTES or is_regular(Path(config.data.tokenizer)) or not is_regular(copy):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(copy)))


def _read(checkpoint: Path, wanted: Any, whole: Any) -> Any:
    """Read the parameters of a checkpoint, and compare them with the fingerprints beside them.

    `whole` are the shapes that count, of which the checkpoint, and `wanted`, may have more for padding.
    """
    remedy = "give an older one (.../checkpoints/STEP), or train on: train.py goes back to one that is whole"
    require_regular_tree(checkpoint, remedy)
    try:
        contents = read_contents(checkpoint)
        require_written(checkpoint, contents)
        params, found = _read_arrays(checkpoint, wanted, whole)
        known, reason = dict(contents["fingerprints"]), ""
    except (ConfigError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except DamagedError as error:
        raise ConfigError(f"checkpoint: {error}; {remedy}") from error
    except Exception as error:  # of orbax, tensorstore, JSON: whatever a damaged file makes them raise
        reason = one_line(error)[:200] or type(error).__name__
    if reason:
        raise ConfigError(f"checkpoint={str(checkpoint)!r}: cannot be read ({reason}); {remedy}")
    wrong = [name for name, word in found.items() if known.get(name) != word]
    if wrong:
        raise ConfigError(f"checkpoint={str(checkpoint)!r}: {wrong[0]} changed since it was written; {remedy}")
    return unflatten_dict(params)["params"]


def _read_arrays(checkpoint: Path, wanted: Any, whole: Any) -> tuple[dict[tuple[str, ...], jax.Array], dict[str, int]]:
    """Read the arrays by their paths below the state, and their fingerprints by name.

    One array at a time: orbax copies all that it is asked for at once on the host, and fingerprints may copy it too.
    Orbax leaves its copy in a circle of references, so garbage is collected for every `_GARBAGE` bytes of copies; for
    every array it would take most of the time in a process that holds many objects.
    """
    params, found, garbage, sizes = {}, {}, 0, flatten_dict(whole)
    for path, array in flatten_dict(wanted).items():
        part = _read_array(checkpoint, ("params", *path), array)
        params |= flatten_dict(part)
        found |= fingerprints(part, unflatten_dict({("params", *path): sizes[path]}))
        garbage += array.size * array.dtype.itemsize
        if garbage >= _GARBAGE:
            gc.collect()
            garbage = 0
    return params, found


def _read_array(checkpoint: Path, path: tuple[str, ...], array: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Read the array at a path of the state, in a nested dict."""
    item = unflatten_dict({path: array})
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    restore_args = jax.tree.map(lambda args: dataclasses.replace(args, strict=False), restore_args)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore((checkpoint / "state").absolute(), args=args)
