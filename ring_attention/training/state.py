"""What a training step changes: parameters, the optimizer's moments and two counters, and where each lies."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_attention.models.transformer import Transformer, parameter_specs, resized_parameters
from ring_attention.training.config import TrainConfig


class TrainState(NamedTuple):
    """All that a training step changes.

    Attributes:
      step: int32, updates done.
      params: nested dict of float32 arrays.
      opt_state: the optimizer's moments.
      skipped: int32, how many of the updates were left out because the loss or a gradient was not finite.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array


def make_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Make the initial state where it will live: no device ever holds more than its shards."""
    return jax.jit(
        functools.partial(_initial_state, config, dict(mesh.shape)), out_shardings=state_shardings(config, mesh)
    )()


def state_with(config: TrainConfig, mesh: Mesh, params: Any) -> TrainState:
    """Make the initial state of a run that begins with `params`, which are sharded as `parameter_specs` says."""
    shardings = state_shardings(config, mesh)
    opt_state = jax.jit(make_optimizer(config).init, out_shardings=shardings.opt_state)(params)
    zero = jax.device_put(jnp.int32(0), shardings.step)
    return TrainState(zero, params, opt_state, jax.device_put(jnp.int32(0), shardings.skipped))


def state_shardings(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return the NamedShardings of the state: the optimizer's moments lie where their parameters do."""
    params = jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(config.model))
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = abstract_state(config)
    opt_state = optax.tree_map_params(
        make_optimizer(config),
        lambda _, sharding: sharding,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, opt_state, replicated)


def abstract_state(config: TrainConfig, mesh_shape: Mapping[str, int] | None = None) -> TrainState:
    """Return shapes and dtypes of the state, as jax.ShapeDtypeStructs; with a mesh's, as they are stored there."""
    return jax.eval_shape(functools.partial(_initial_state, config, mesh_shape))


def sharded_abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return shapes, dtypes and shardings of the state, as jax.ShapeDtypeStructs."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_state(config, mesh.shape),
        state_shardings(config, mesh),
    )


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Return the learning rate of each update: a linear warm-up, then a cosine down to `final_fraction` of the peak."""
    optimizer = config.optimizer
    first = optimizer.learning_rate / (optimizer.warmup_steps + 1)  # at 0 the first update would be wasted
    return optax.warmup_cosine_decay_schedule(
        init_value=first,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=config.num_steps,
        end_value=optimizer.learning_rate * optimizer.final_fraction,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the optimizer: clip by global norm, then AdamW; matrices decay, norms and biases do not."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            mask=lambda params: jax.tree.map_with_path(_decays, params),
        ),
    )


def _initial_state(config: TrainConfig, mesh_shape: Mapping[str, int] | None) -> TrainState:
    model = Transformer(config.model, nnx.Rngs(config.seed))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if mesh_shape is not None:
        params = resized_parameters(params, config.model, mesh_shape)
    return TrainState(jnp.int32(0), params, make_optimizer(config).init(params), jnp.int32(0))


def _decays(path, _) -> bool:
    return not any(word in str(key) for key in path for word in ("norm", "bias"))
