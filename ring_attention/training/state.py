"""What a training step changes: parameters, the optimizer's moments and two counters, and where each lies."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_attention.models.transformer import Transformer, parameter_specs, resized_parameters
from ring_attention.parallel.host_memory import on_host
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
    shardings = state_shardings(config, mesh)
    shape = dict(mesh.shape)
    if config.optimizer.offload == "none":
        return jax.jit(functools.partial(_initial_state, config, shape), out_shardings=shardings)()
    params = jax.jit(functools.partial(_initial_params, config, shape), out_shardings=shardings.params)()
    return state_with(config, mesh, params)


def state_with(config: TrainConfig, mesh: Mesh, params: Any) -> TrainState:
    """Make the initial state of a run that begins with `params`, which are sharded as `parameter_specs` says."""
    shardings = state_shardings(config, mesh)
    zeros = jax.tree.map(_zeros, abstract_state(config, dict(mesh.shape)), shardings)  # as Adam and its schedule begin
    return zeros._replace(params=jax.device_put(params, shardings.params))


def _zeros(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """Zeros that are made on the host, and go straight to the memory that they are to lie in."""
    of_shard = sharding.shard_shape(shape.shape)
    return jax.make_array_from_callback(shape.shape, sharding, lambda _: np.zeros(of_shard, shape.dtype))


def state_shardings(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return the NamedShardings of the state: moments are sharded as their parameters.

    `optimizer.offload` says which of them lie in the memory of the host.
    """
    offload = config.optimizer.offload
    params = jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(config.transformer))
    offloaded = params | {"layers": jax.tree.map(on_host, params["layers"])} if offload != "none" else params
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        make_optimizer(config),
        lambda _, sharding: sharding,
        abstract_state(config).opt_state,
        offloaded,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, offloaded if offload == "parameters" else params, opt_state, replicated)


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


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer: clip by global norm, then AdamW; matrices decay, norms and biases do not.

    Its `update` takes the norm of all gradients as `norm`, so that it can be called with some of them.
    """
    optimizer = config.optimizer
    return optax.chain(
        _clip_by_norm(optimizer.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            mask=lambda params: jax.tree.map_with_path(_decays, params),
        ),
    )


def _clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """As `optax.clip_by_global_norm`, but the norm may be given."""

    def update(grads, state, params=None, *, norm=None, **_):
        norm = optax.tree.norm(grads) if norm is None else norm
        fits = norm < limit
        return jax.tree.map(lambda g: jnp.where(fits, g, g / norm * limit), grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _initial_state(config: TrainConfig, mesh_shape: Mapping[str, int] | None) -> TrainState:
    params = _initial_params(config, mesh_shape)
    return TrainState(jnp.int32(0), params, make_optimizer(config).init(params), jnp.int32(0))


def _initial_params(config: TrainConfig, mesh_shape: Mapping[str, int] | None):
    params = nnx.to_pure_dict(nnx.state(Transformer(config.transformer, nnx.Rngs(config.seed)), nnx.Param))
    return params if mesh_shape is None else resized_parameters(params, config.transformer, mesh_shape)


def _decays(path, _) -> bool:
    return not any(word in str(key) for key in path for word in ("norm", "bias", "sinks"))
