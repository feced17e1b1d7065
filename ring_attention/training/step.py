"""One training step: gradients per device inside a `shard_map`, the optimizer's update on the shards."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.models.layers import Attend
from ring_attention.models.transformer import model_builder, parameter_specs
from ring_attention.parallel.host_memory import on_device
from ring_attention.parallel.mesh import DATA, SEQUENCE, compiler_options
from ring_attention.parallel.shard import context_attention_shard
from ring_attention.parallel.sharding import TOKEN_AXES, spec_of
from ring_attention.training.config import AttentionConfig, TrainConfig
from ring_attention.training.offload import add_gradients, apply_update, global_norm
from ring_attention.training.state import TrainState, make_optimizer, state_shardings

BATCH_SPEC = spec_of(("batch", "sequence"))

Batch = dict[str, jax.Array]
"""tokens, targets, positions, segment_ids, loss_mask: each [B,T] in the layout's order."""


def attention_of(config: AttentionConfig, ring_size: int) -> Attend:
    """Return the attention that a model's layers call on the slices of one of `ring_size` devices."""
    return functools.partial(
        context_attention_shard,
        strategy=config.make_strategy(),
        axis_name=SEQUENCE,
        layout=config.make_layout(ring_size),
        window=config.window or None,
        softcap=config.softcap or None,
        impl=config.impl,
        block_sizes=config.block_sizes,
    )


def make_train_step(config: TrainConfig, mesh: Mesh):
    """Return step(state, batch) -> (state, metrics), compiled for `mesh`; the state's buffers are reused.

    Metrics are float32 scalars: loss (nats per target, the mean over all targets of the batch), grad_norm (before
    clipping), targets (number of them), skipped (1 if the update was left out, else 0). An update is left out where the
    loss or the gradients' norm is not finite: parameters and moments stay as they were.
    """
    advance = (_advance if config.optimizer.offload == "none" else _advance_by_layers)(config, mesh)
    shardings = state_shardings(config, mesh)

    def step(state: TrainState, batch: Batch):
        params, opt_state, loss, norm, targets, finite = advance(state.params, state.opt_state, batch)
        skipped = 1 - finite.astype(jnp.int32)
        metrics = {"loss": loss, "grad_norm": norm, "targets": targets, "skipped": skipped.astype(jnp.float32)}
        return TrainState(state.step + 1, params, opt_state, state.skipped + skipped), metrics

    batch = NamedSharding(mesh, BATCH_SPEC)
    return jax.jit(
        step,
        in_shardings=(shardings, batch),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def _advance(config: TrainConfig, mesh: Mesh):
    """Return advance(params, opt_state, batch) -> (params, opt_state, loss, norm, targets, finite)."""
    optimizer, gradients = make_optimizer(config), make_gradients(config, mesh)

    def advance(params, opt_state, batch):
        grads, loss, targets = gradients(params, batch)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            updates, after = optimizer.update(grads, opt_state, params, norm=norm)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            after = optax.apply_updates(params, updates), after
            params, opt_state = jax.tree.map(functools.partial(jnp.where, finite), after, (params, opt_state))
        return params, opt_state, loss, norm, targets, finite

    return advance


def _advance_by_layers(config: TrainConfig, mesh: Mesh):
    """Return what `_advance` does, for a state of which the layers' part is on the host."""
    optimizer, sum_gradients = make_optimizer(config), _sums_of_gradients(config, mesh)

    def on_each_device(params, opt_state, batch):
        sums, nats, targets = sum_gradients(params, batch)
        count = jnp.maximum(targets, 1)
        with jax.named_scope("optimizer"):
            loss, norm = nats / count, global_norm(sums, count)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            params, opt_state = apply_update(optimizer, params, opt_state, sums, count, norm, finite)
        return params, opt_state, loss, norm, targets, finite

    state = jax.tree.map(lambda sharding: sharding.spec, state_shardings(config, mesh))
    specs = state.params, state.opt_state
    return jax.shard_map(
        on_each_device, mesh=mesh, in_specs=(*specs, BATCH_SPEC), out_specs=(*specs, *[PartitionSpec()] * 4)
    )


def make_gradients(config: TrainConfig, mesh: Mesh):
    """Return gradients(params, batch) -> (grads, loss, targets); the loss is the mean over the batch's targets."""
    specs = parameter_specs(config.model)
    sum_gradients = _sums_of_gradients(config, mesh)

    def on_each_device(params, batch):
        sums, nats, targets = sum_gradients(params, batch)
        count = jnp.maximum(targets, 1)
        return jax.tree.map(lambda g: g / count, on_device(sums)), nats / count, targets

    out_specs = (specs, PartitionSpec(), PartitionSpec())
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=(specs, BATCH_SPEC), out_specs=out_specs)


def _sums_of_gradients(config: TrainConfig, mesh: Mesh):
    """Return sums(params, batch) -> (grads, nats, targets), over all micro-batches, for one device of a `shard_map`.

    Gradients lie where their parameters do.
    """
    differentiate = jax.value_and_grad(_sum_of_losses(config, mesh), has_aux=True)
    micro_batches, offload = config.optimizer.accumulation_steps, config.optimizer.offload
    by_layers = offload != "none"
    once = micro_batches > 1 and offload != "parameters"  # summed over dp after all micro-batches, not in each
    add = add_gradients if by_layers else functools.partial(jax.tree.map, jnp.add)

    def sum_gradients(params, batch):
        if once:
            params = vary_over(params, frozenset({DATA}))

        def add_micro_batch(carry, micro_batch):
            (nats, targets), grads = differentiate(params, micro_batch)
            total, *counts = carry
            return (add(total, grads), *jax.tree.map(jnp.add, counts, [nats, targets])), None

        split = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        if by_layers:  # begins with the first, as arrays of the host cannot be filled with zeros there
            (nats, targets), grads = differentiate(params, jax.tree.map(lambda x: x[0], split))
            first, split = (grads, nats, targets), jax.tree.map(lambda x: x[1:], split)
        else:
            first = (_zeros_varying_like(params), jnp.float32(0), jnp.float32(0))
        (grads, nats, targets), _ = lax.scan(add_micro_batch, first, split, unroll=micro_batches == 1)
        return lax.psum(grads, DATA) if once else grads, nats, targets

    return sum_gradients


def make_eval_step(config: TrainConfig, mesh: Mesh):
    """Return evaluate(params, batch) -> (nats, targets): float32 sums over all targets of the batch."""
    specs = parameter_specs(config.model)
    on_device = jax.shard_map(
        _sum_of_losses(config, mesh),
        mesh=mesh,
        in_specs=(specs, BATCH_SPEC),
        out_specs=(PartitionSpec(), PartitionSpec()),
    )
    return jax.jit(on_device)


def _sum_of_losses(config: TrainConfig, mesh: Mesh):
    """Return loss(params, batch) -> (nats, targets): sums over all devices, for a mean over targets."""
    build, attend = model_builder(config.model), attention_of(config.attention, mesh.shape[SEQUENCE])

    def sum_of_losses(params, batch):
        mask_bt = batch["loss_mask"].astype(jnp.float32)
        nats = build(params).weighted_loss(
            batch["tokens"],
            batch["targets"],
            mask_bt,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            attend=attend,
        )
        return lax.psum(nats, TOKEN_AXES), lax.psum(mask_bt.sum(), TOKEN_AXES)

    return sum_of_losses


def _zeros_varying_like(tree):
    return jax.tree.map(lambda x: vary_over(jnp.zeros_like(x), axes_of(x)), tree)
