"""A trained model in a folder: its config, and its parameters on the devices of any mesh."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

from ring_attention.checks import ConfigError, one_line, require_field
from ring_attention.models.config import ModelConfig
from ring_attention.models.transformer import abstract_parameters, parameter_specs
from ring_attention.training.config import TrainConfig
from ring_attention.training.run_folder import RunFolder, read_config
from ring_attention.training.survival.fingerprint import fingerprints

_NEED = "give the folder of a run of train.py or one of its checkpoints: runs/NAME, runs/NAME/checkpoints/200"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that was trained.

    Attributes:
      checkpoint: the folder that holds its parameters.
      config: of the run that made it.
    """

    checkpoint: Path
    config: TrainConfig

    def load(self, mesh: Mesh, dtype: str = "float32") -> Any:
        """The parameters, a nested dict of arrays of `dtype` sharded as `parameter_specs` says; nothing else is read.

        Raises:
          ConfigError: if the checkpoint does not hold this model, or is not as it was written.
        """
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(self.config.model))
        wanted = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract_parameters(self.config.model),
            shardings,
        )
        params = _read(self.checkpoint, wanted)
        if jnp.dtype(dtype) == jnp.float32:
            return params
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree), out_shardings=shardings)
        return cast(params)

    @property
    def model(self) -> ModelConfig:
        """Of the config."""
        return self.config.model


def open_trained(path: str) -> Trained:
    """Find the newest checkpoint of a run, or the one that `path` names, and the config beside it; reads no arrays.

    Raises:
      ConfigError: if there is none.
    """
    folder = Path(path)
    chosen = folder if folder.parent.name == "checkpoints" else None
    run = RunFolder(folder.parents[1] if chosen else folder)
    require_field(run.config.is_file(), "checkpoint", path, "has no config.json", _NEED)
    if chosen is None:
        steps = [int(file.name) for file in run.checkpoints.glob("*") if file.name.isdecimal()]
        require_field(bool(steps), "checkpoint", path, "holds no checkpoint yet", "wait for the first, or train on")
        chosen = run.checkpoints / str(max(steps))
    require_field((chosen / "state").is_dir(), "checkpoint", path, "is no checkpoint", _NEED)
    return Trained(chosen, read_config(run))


def _read(checkpoint: Path, wanted: Any) -> Any:
    """The parameters in a checkpoint, compared with the fingerprints that were written beside them."""
    remedy = "give an older one (.../checkpoints/STEP), or train on: train.py goes back to one that is whole"
    item = {"params": wanted}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            params = reader.restore((checkpoint / "state").absolute(), args=args)["params"]
        known = json.loads((checkpoint / "data" / "metadata").read_text())["fingerprints"]
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # of orbax, tensorstore, JSON: whatever a damaged file makes them raise
        reason = one_line(error)[:200]
        raise ConfigError(f"checkpoint={str(checkpoint)!r}: cannot be read ({reason}); {remedy}") from error
    wrong = [name for name, word in fingerprints({"params": params}).items() if known.get(name) != word]
    if wrong:
        raise ConfigError(f"checkpoint={str(checkpoint)!r}: {wrong[0]} changed since it was written; {remedy}")
    return params
