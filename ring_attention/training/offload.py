"""The update of a state whose layers live, in part, in the memory of the host (`OptimizerConfig.offload`)."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ring_attention.attention.varying import axes_of
from ring_attention.models.layer_kinds import RUNS
from ring_attention.parallel.host_memory import fold_layers, update_layers

LAYERS = "layers"
"""The key of what all layers have, stacked, in trees shaped as the parameters."""


def stacks_of(tree: dict) -> dict[str, dict]:
    """Return the part of a tree shaped as the parameters that lives on the host: for each run its stack, by name."""
    layers = tree[LAYERS]
    names = {name for name in layers if name.startswith(RUNS)}
    return {name: {LAYERS: {name: layers[name]}} for name in sorted(names)} or {LAYERS: {LAYERS: layers}}


def layers_from(stacks: Iterable[dict]) -> dict:
    """Undo `stacks_of`."""
    return {LAYERS: {name: value for stack in stacks for name, value in stack[LAYERS].items()}}


def rest_of(tree: dict) -> dict:
    """Return what `stacks_of` leaves."""
    return {name: value for name, value in tree.items() if name != LAYERS}


def add_gradients(total: dict, more: dict) -> dict:
    """Add two trees of gradients, layer by layer, wherever they lie."""
    total_by_run, more_by_run = stacks_of(total), stacks_of(more)
    add = functools.partial(jax.tree.map, jnp.add)
    layers = layers_from(update_layers(add, stack, more_by_run[name]) for name, stack in total_by_run.items())
    return layers | jax.tree.map(jnp.add, rest_of(total), rest_of(more))


def global_norm(sums: dict, count: jax.Array) -> jax.Array:
    """Return the norm of `sums` / `count` over all devices; for use inside a `shard_map`.

    Args:
      sums: this device's shards of gradients, in any memory.
      count: what to divide by, a float32 scalar.
    """

    def squares(tree):
        return [lax.psum(jnp.square(x / count).sum(), tuple(axes_of(x))) for x in jax.tree.leaves(tree)]

    def add(total, layer):
        return jax.tree.map(jnp.add, total, squares(layer))

    total = sum(squares(rest_of(sums)))
    for stack in stacks_of(sums).values():
        total += sum(fold_layers(add, [jnp.float32(0)] * len(jax.tree.leaves(stack)), stack))
    return jnp.sqrt(total)


def apply_update(
    optimizer: optax.GradientTransformationExtraArgs,
    params: dict,
    opt_state: Any,
    sums: dict,
    count: jax.Array,
    norm: jax.Array,
    finite: jax.Array,
) -> tuple[dict, Any]:
    """Return new parameters and optimizer state, updated layer by layer; for use inside a `shard_map`.

    Args:
      optimizer: of `make_optimizer`.
      params, opt_state: this device's shards, in any memory.
      sums: of gradients, this device's shards, in any memory.
      count: what to divide them by.
      norm: of the gradients.
      finite: whether to update; otherwise all stays as it was.
    """

    def update(state, sums):
        params, moments = state
        before = _with_moments(opt_state, moments)
        updates, after = optimizer.update(jax.tree.map(lambda x: x / count, sums), before, params, norm=norm)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        params = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), optax.apply_updates(params, updates), params
        )
        return params, after

    def update_moments(state, sums):
        params, after = update(state, sums)
        return params, _moments(after)

    moments = _moments(opt_state)
    rest, after = update((rest_of(params), [rest_of(x) for x in moments]), rest_of(sums))
    sums_by_run, moments_by_run = stacks_of(sums), [stacks_of(x) for x in moments]
    updated = [
        update_layers(update_moments, (stack, [each[name] for each in moments_by_run]), sums_by_run[name])
        for name, stack in stacks_of(params).items()
    ]
    layers = layers_from(stack for stack, _ in updated)
    moments = [layers_from(stacks) for stacks in zip(*(each for _, each in updated), strict=True)]
    merged = [x | y for x, y in zip(_moments(after), moments, strict=True)]
    return rest | layers, _with_moments(after, merged)


def _moments(opt_state: Any) -> list[dict]:
    """The trees in an optimizer's state that are shaped as the parameters."""
    return [x for x in jax.tree.leaves(opt_state, is_leaf=_like_params) if _like_params(x)]


def _with_moments(opt_state: Any, moments: list[dict]) -> Any:
    """`opt_state` with these in place of its `_moments`."""
    given = iter(moments)
    return jax.tree.map(lambda x: next(given) if _like_params(x) else x, opt_state, is_leaf=_like_params)


def _like_params(x: Any) -> bool:
    return isinstance(x, dict)
