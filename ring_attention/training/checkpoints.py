"""Checkpoints: the newest few states of a run and where its data had got to, written while training goes on."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ring_attention.checks import ConfigError, require

KEEP = 3  # a checkpoint holds parameters and two moments: 12 bytes a parameter


class Checkpoints:
    """The checkpoints in a folder, as a context manager.

    Every process of a run makes one and calls it alike. A checkpoint that was not written to its end does not count.
    """

    def __init__(self, path: Path):
        """Open `path`, a folder, made if there is none; the KEEP newest checkpoints stay in it."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(KEEP),
            cleanup_tmp_directories=True,
        )
        self._path = Path(path).absolute()
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Start to save; returns once `state` is copied to the host, so that its buffers may be donated.

        Args:
          step: newer than the latest.
          state: pytree of jax arrays, sharded as they may be.
          data: what JSON can hold: the position in the data.

        Raises:
          ValueError: if `step` is not newer than the latest. An earlier save that failed raises here, too.
        """
        latest = self.latest_step()
        require(
            latest is None or step > latest,
            f"step={step} is not newer than the latest checkpoint, {latest}; save each step once",
        )
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        )

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, saved or being saved, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Return the state and the data position of `step`.

        Args:
          step: one that is there, such as `latest_step()`.
          abstract_state: the state as jax.ShapeDtypeStructs with shardings, on any mesh: that is how it comes back.

        Raises:
          ConfigError: if the checkpoint's arrays have other names, shapes or dtypes.
          ValueError: if there is no such step.
        """
        self.wait()
        steps = self._manager.all_steps()
        require(step in steps, f"step={step} has no checkpoint in {self._path}; choose one of {sorted(steps)}")
        self._require_fit(step, abstract_state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["data"]

    def _require_fit(self, step: int, abstract_state: Any) -> None:
        """Raise ConfigError unless the checkpoint holds just the arrays of `abstract_state`.

        Orbax would cast another dtype silently, and tell of another shape in pages.
        """
        stored = _describe(self._manager.item_metadata(step)["state"].tree)
        wanted = _describe(abstract_state)
        for name in sorted(stored.keys() | wanted.keys()):
            got, need = stored.get(name, "absent"), wanted.get(name, "absent")
            if got != need:
                remedy = "go on with the model and optimizer that wrote it, or start another run"
                raise ConfigError(f"{self._path / str(step)}: {name} is {got}, this run needs {need}; {remedy}")

    def wait(self) -> None:
        """Return when every save that was started lies on disk; raise if one failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go of the folder."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def abstract_like(state: Any) -> Any:
    """Return `state`'s shapes, dtypes and shardings as jax.ShapeDtypeStructs, without its values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _describe(tree: Any) -> dict[str, str]:
    """Return dtype and shape of every array, by dotted name; random keys count as the integers they are made of."""
    words = {}
    for path, leaf in ocp.tree.to_flat_dict(tree).items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        words[".".join(path)] = f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return words
