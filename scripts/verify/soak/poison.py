"""Make a weight of a run's newest checkpoint infinite, as if training had: the checkpoint itself is whole."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from ring_attention.parallel.mesh import make_mesh
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config_values import config_from_dict
from ring_attention.training.state import sharded_abstract_state

if __name__ == "__main__":
    folder, layer = (word.partition("=")[2] for word in sys.argv[1:])  # --config.run_dir=FOLDER --layer=N
    values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    values.pop("version")
    mesh, path = make_mesh(sp=1, devices=jax.devices()[:1]), Path(folder, "checkpoints")  # they come back on any
    with Checkpoints(path) as checkpoints:
        restored = checkpoints.restore_newest(sharded_abstract_state(config_from_dict(values), mesh), warn=print)
    leaves, structure = jax.tree.flatten(restored.state.params["layers"])
    matrix = next(i for i, weight in enumerate(leaves) if weight.ndim > 2)
    leaves[matrix] = leaves[matrix].at[(int(layer), *[0] * (leaves[matrix].ndim - 1))].set(jnp.inf)
    params = restored.state.params | {"layers": jax.tree.unflatten(structure, leaves)}
    shutil.rmtree(path / str(restored.step))
    with Checkpoints(path) as checkpoints:
        checkpoints.save(restored.step, restored.state._replace(params=params), restored.data)
