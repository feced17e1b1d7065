"""Make a weight of a run's newest checkpoint infinite, as if training had: the checkpoint itself is whole.

python scripts/soaking/poison.py --config.run_dir=soak/copy --layer=1
"""

import json
import shutil

import jax
import jax.numpy as jnp

from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config_values import config_from_dict
from ring_attention.training.state import sharded_abstract_state

MESH = dict(dp=1, fsdp=1, sp=1, tp=1)  # checkpoints come back on any


def main() -> None:
    """Read the checkpoint, change one layer of one weight, write it in the old one's place."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config.run_dir", dest="run_dir", type=local_path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    args = parser.parse_args()
    values = json.loads((args.run_dir / "config.json").read_text(encoding="utf-8"))
    values.pop("version")
    simulate_devices(1)
    abstract = sharded_abstract_state(config_from_dict(values), make_mesh(**MESH))
    path = args.run_dir / "checkpoints"
    with Checkpoints(path) as checkpoints:
        restored = checkpoints.restore_newest(abstract, warn=print)
    shutil.rmtree(path / str(restored.step))
    with Checkpoints(path) as checkpoints:
        checkpoints.save(restored.step, poisoned(restored.state, args.layer), restored.data)


def poisoned(state, layer: int):
    """`state` with an infinite number in the first of `layer`'s matrices."""
    leaves, structure = jax.tree.flatten(state.params["layers"])
    first = next(i for i, weight in enumerate(leaves) if weight.ndim > 2)
    leaves[first] = leaves[first].at[(layer, *[0] * (leaves[first].ndim - 1))].set(jnp.inf)
    return state._replace(params=state.params | {"layers": jax.tree.unflatten(structure, leaves)})


if __name__ == "__main__":
    main()
