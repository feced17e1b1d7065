"""Make a weight of a run's newest checkpoint infinite, as if training had: the checkpoint itself is whole."""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from ring_attention.parallel.mesh import make_mesh
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.run_folder import RunFolder, read_config
from ring_attention.training.state import abstract_state, sharded_abstract_state

if __name__ == "__main__":
    folder, layer = (word.partition("=")[2] for word in sys.argv[1:])  # --config.run_dir=FOLDER --layer=N
    run, mesh = RunFolder(Path(folder)), make_mesh(sp=1, devices=jax.devices()[:1])  # arrays come back on any mesh
    with Checkpoints(run.checkpoints, abstract_state(read_config(run))) as checkpoints:
        restored = checkpoints.restore_newest(sharded_abstract_state(read_config(run), mesh), warn=print)
    leaves, structure = jax.tree.flatten(restored.state.params["layers"])
    matrix = next(i for i, weight in enumerate(leaves) if weight.ndim > 2)
    leaves[matrix] = leaves[matrix].at[(int(layer), *[0] * (leaves[matrix].ndim - 1))].set(jnp.inf)
    params = restored.state.params | {"layers": jax.tree.unflatten(structure, leaves)}
    shutil.rmtree(run.checkpoints / str(restored.step))
    with Checkpoints(run.checkpoints, abstract_state(read_config(run))) as checkpoints:
        checkpoints.save(restored.step, restored.state._replace(params=params), restored.data)
