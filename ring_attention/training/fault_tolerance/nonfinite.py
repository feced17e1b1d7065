"""Losses and gradients that are not finite: how many steps in a row to bear with, and which layer they come from."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ring_attention.attention.varying import vary_over
from ring_attention.models.transformer import model_builder, parameter_specs
from ring_attention.parallel.host_memory import on_device
from ring_attention.parallel.mesh import AXES, SEQUENCE
from ring_attention.training.attend import attention_of
from ring_attention.training.config import TrainConfig
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.fault_tolerance.integrity import leaf_names
from ring_attention.training.step import BATCH_SPEC, make_gradients


class NonFiniteGuard:
    """Counts the steps in a row whose update was left out, and ends the run at the limit."""

    def __init__(self, config: TrainConfig, mesh: Mesh, folder: Path):
        """Prepare; where the run ends, this process's rows of the batch are written to `folder`."""
        self._config, self._mesh, self._folder = config, mesh, folder
        self._in_a_row = 0
        self._watched = None

    def watch(self, step: int, numbers: dict, batch: dict[str, jax.Array], rows: dict[str, np.ndarray]) -> None:
        """Remember a step that was just started: its metrics, and its batch as `Feed` gives it."""
        self._watched = step, numbers, batch, rows

    def settle(self, params: Any) -> None:
        """Wait for the step that is watched, if any, and look at it; every process calls this alike.

        The next step is sent to the devices after that, so they idle for as long as that takes, about a millisecond.

        Args:
          params: the parameters after the step: those before it, if its update was left out.

        Raises:
          RunError: if its update was left out and that of `optimizer.max_skipped_updates` - 1 steps before, too: it
            names step, batch and layer.
        """
        if self._watched is None:
            return
        (step, numbers, batch, rows), self._watched = self._watched, None
        skipped = bool(numbers["skipped"])
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row < self._config.optimizer.max_skipped_updates:
            return
        try:
            origin = find_origin(self._config, self._mesh, params, batch)
        except jax.errors.JaxRuntimeError as error:  # looking takes memory of its own
            origin = f"where it began could not be found ({str(error).splitlines()[0][:100]})"
        raise RunError(
            f"step {step}: the loss or its gradient was not finite {self._in_a_row} times in a row, and the updates "
            f"were left out; {origin}; the batch {self._keep(step, rows)}; look at it, or lower "
            "optimizer.learning_rate, and start the run again: it goes on from its newest checkpoint"
        )

    def _keep(self, step: int, rows: dict[str, np.ndarray]) -> str:
        """Write this process's rows of the batch to a file, and say where it is."""
        path = self._folder / f"nonfinite_step_{step}_process_{jax.process_index()}.npz"
        try:
            np.savez_compressed(path, **rows)
        except OSError as error:
            return f"could not be written to {path} ({error.strerror})"
        return f"is in {path}"


def find_origin(config: TrainConfig, mesh: Mesh, params: Any, batch: dict[str, jax.Array]) -> str:
    """Say in words where numbers that are not finite first appear: in a parameter, a layer forward, or one backward."""
    bad = _bad_leaves(config, params)
    if bad:
        return f"parameter {bad[0]} holds a number that is not finite"
    finite_L = jax.device_get(_finite_layers(config, mesh)(params, batch))
    if not finite_L.all():
        return f"going forward they first appear in layer {int(np.argmin(finite_L))} of {finite_L.size}"
    grads, loss, _ = jax.jit(make_gradients(config, mesh))(params, batch)
    if not np.isfinite(jax.device_get(loss)):
        return "all layers are finite going forward, the loss after them is not"
    bad = _bad_leaves(config, grads)
    inner = [int(name.rpartition(" layer ")[2]) for name in bad if " layer " in name]
    if inner:
        return f"going backward they first appear in layer {max(inner)} of {finite_L.size}"
    return f"they first appear in the gradient of {bad[0]}" if bad else "each gradient is finite, their norm is not"


def _bad_leaves(config: TrainConfig, tree: Any) -> list[str]:
    """Names of the arrays that hold numbers that are not finite; of stacks of layers, with the layer's number."""
    runs = [config.transformer.loop.run_of(name.split(".")) for name in leaf_names(tree)]

    @jax.jit
    def finite(leaves):
        axes = [None if run is None else tuple(range(1, x.ndim)) for x, run in zip(leaves, runs, strict=True)]
        return [jnp.isfinite(on_device(x)).all(axis) for x, axis in zip(leaves, axes, strict=True)]

    names = []
    for name, run, good in zip(leaf_names(tree), runs, jax.device_get(finite(jax.tree.leaves(tree))), strict=True):
        if run is not None:
            names += [f"{name} of layer {run.numbers[place]}" for place in np.flatnonzero(~good)]
        elif not good:
            names.append(name)
    return names


def _finite_layers(config: TrainConfig, mesh: Mesh):
    """Return finite(params, batch) -> bool [L], which says if the residual stream is finite after each layer."""
    build, attend = (
        model_builder(config.transformer),
        attention_of(config.attention, config.transformer, mesh.shape[SEQUENCE]),
    )

    def on_device(params, batch):
        def of_micro_batch(batch):
            return build(params).finite_layers(
                batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], attend=attend
            )

        split = jax.tree.map(lambda x: x.reshape(config.optimizer.accumulation_steps, -1, *x.shape[1:]), batch)
        finite_L = lax.map(of_micro_batch, split).all(0)
        return lax.pmin(vary_over(finite_L.astype(jnp.int32), frozenset(AXES)), AXES)

    specs = parameter_specs(config.transformer)
    shard = jax.shard_map(on_device, mesh=mesh, in_specs=(specs, BATCH_SPEC), out_specs=PartitionSpec())
    return jax.jit(lambda params, batch: shard(params, batch).astype(bool))
