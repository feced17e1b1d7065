"""One training step: gradients per device inside a `shard_map`, the optimizer's update on the shards."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.data.loader import TABLE
from ring_attention.models.transformer import model_builder, parameter_specs
from ring_attention.parallel.host_memory import on_device
from ring_attention.parallel.mesh import DATA, FSDP, SEQUENCE, compiler_options
from ring_attention.parallel.sharding import TOKEN_AXES, spec_of
from ring_attention.training.attend import attention_of
from ring_attention.training.config import TrainConfig
from ring_attention.training.offload import add_gradients, apply_update, global_norm
from ring_attention.training.state import TrainState, make_optimizer, state_shardings

BATCH_SPEC = spec_of(("batch", "sequence"))

Batch = dict[str, jax.Array]
"""tokens, targets, positions, segment_ids, loss_mask: each [B,T] in the layout's order; where rows are dealt by their
documents the table of `DealtRows`, [B,P,n]."""


def make_train_step(config: TrainConfig, mesh: Mesh):
    """Return step(state, batch) -> (state, metrics), compiled for `mesh`; the state's buffers are reused.

    Metrics are float32 scalars: loss (nats per target, the mean over all targets of the batch), grad_norm (before
    clipping), targets (number of them), skipped (1 if the update was left out, else 0). An update is left out where the
    loss or the gradients' norm is not finite: parameters and moments stay as they were.
    """
    advance = (_advance if config.optimizer.offload == "none" else _advance_by_layers)(config, mesh)
    shardings = state_shardings(config, mesh)

    def step(state: TrainState, batch: Batch):
        params, opt_state, loss, norm, targets, finite = advance(state.params, state.opt_state, batch, state.step)
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
    """Return advance(params, opt_state, batch, step) -> (params, opt_state, loss, norm, targets, finite)."""
    optimizer, gradients = make_optimizer(config), make_gradients(config, mesh)

    def advance(params, opt_state, batch, step):
        grads, loss, targets = gradients(params, batch, step)
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

    def on_each_device(params, opt_state, batch, step):
        sums, nats, targets = sum_gradients(params, batch, step)
        count = jnp.maximum(targets, 1)
        with jax.named_scope("optimizer"):
            loss, norm = nats / count, global_norm(sums, count)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            params, opt_state = apply_update(optimizer, params, opt_state, sums, count, norm, finite)
        return params, opt_state, loss, norm, targets, finite

    state = jax.tree.map(lambda sharding: sharding.spec, state_shardings(config, mesh))
    specs = state.params, state.opt_state
    return jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(*specs, BATCH_SPEC, PartitionSpec()),
        out_specs=(*specs, *[PartitionSpec()] * 4),
    )


def make_gradients(config: TrainConfig, mesh: Mesh):
    """Return gradients(params, batch, step=0) -> (grads, loss, targets); the loss is the mean over the batch's targets.

    Dropout goes by the number of the step.
    """
    specs = parameter_specs(config.transformer)
    sum_gradients = _sums_of_gradients(config, mesh)

    def on_each_device(params, batch, step):
        sums, nats, targets = sum_gradients(params, batch, step)
        count = jnp.maximum(targets, 1)
        return jax.tree.map(lambda g: g / count, on_device(sums)), nats / count, targets

    out_specs = (specs, PartitionSpec(), PartitionSpec())
    in_specs = (specs, BATCH_SPEC, PartitionSpec())
    sharded = jax.shard_map(on_each_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return lambda params, batch, step=0: sharded(params, batch, jnp.int32(step))


def _sums_of_gradients(config: TrainConfig, mesh: Mesh):
    """Return sums(params, batch, step) -> (grads, nats, targets), over all micro-batches, in a `shard_map`.

    Gradients lie where their parameters do.
    """
    differentiate = jax.value_and_grad(_sum_of_losses(config, mesh, training=True), has_aux=True)
    micro_batches, offload = config.optimizer.accumulation_steps, config.optimizer.offload
    by_layers = offload != "none"
    once = micro_batches > 1 and offload != "parameters"  # summed over dp after all micro-batches, not in each
    add = add_gradients if by_layers else functools.partial(jax.tree.map, jnp.add)

    def sum_gradients(params, batch, step):
        if once:
            params = vary_over(params, frozenset({DATA}))

        def add_micro_batch(carry, numbered):
            number, micro_batch = numbered
            (nats, targets), grads = differentiate(params, micro_batch, step, number)
            total, *counts = carry
            return (add(total, grads), *jax.tree.map(jnp.add, counts, [nats, targets])), None

        split = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        split = jnp.arange(micro_batches, dtype=jnp.int32), split
        if by_layers:  # begins with the first, as arrays of the host cannot be filled with zeros there
            (nats, targets), grads = differentiate(params, jax.tree.map(lambda x: x[0], split[1]), step, 0)
            first, split = (grads, nats, targets), jax.tree.map(lambda x: x[1:], split)
        else:
            first = (_zeros_varying_like(params), jnp.float32(0), jnp.float32(0))
        (grads, nats, targets), _ = lax.scan(add_micro_batch, first, split, unroll=micro_batches == 1)
        return lax.psum(grads, DATA) if once else grads, nats, targets

    return sum_gradients


def make_eval_step(config: TrainConfig, mesh: Mesh):
    """Return evaluate(params, batch) -> (nats, targets): float32 sums over all targets of the batch."""
    specs = parameter_specs(config.transformer)
    on_device = jax.shard_map(
        _sum_of_losses(config, mesh),
        mesh=mesh,
        in_specs=(specs, BATCH_SPEC),
        out_specs=(PartitionSpec(), PartitionSpec()),
    )
    return jax.jit(on_device)


def _sum_of_losses(config: TrainConfig, mesh: Mesh, *, training: bool = False):
    """Return loss(params, batch, step=0, micro_batch=0) -> (nats, targets): sums over all devices, for a mean.

    In training it drops what `attention.dropout_rate` says, by the numbers of the step and of each sequence in it.
    """
    model, P = config.transformer, mesh.shape[SEQUENCE]
    build, drops = model_builder(model), training and config.attention.dropout_rate > 0

    def sum_of_losses(params, batch, step=0, micro_batch=0):
        options = {}
        if drops:
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            device, rows = lax.axis_index((DATA, FSDP)), len(batch["tokens"])
            first = (device * config.optimizer.accumulation_steps + micro_batch) * rows
            options = dict(dropout_key=key, first_sequence=first)
        attend = attention_of(config.attention, model, P, table=batch.get(TABLE), **options)
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
