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
from ring_attention.parallel.mesh import DATA, SEQUENCE, compiler_options
from ring_attention.parallel.shard import context_attention_shard
from ring_attention.parallel.sharding import TOKEN_AXES, spec_of
from ring_attention.training.config import AttentionConfig, TrainConfig
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
    optimizer = make_optimizer(config)
    gradients = make_gradients(config, mesh)
    shardings = state_shardings(config, mesh)

    def step(state: TrainState, batch: Batch):
        grads, loss, targets = gradients(state.params, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            params, opt_state = jax.tree.map(
                functools.partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state)
            )
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


def make_gradients(config: TrainConfig, mesh: Mesh):
    """Return gradients(params, batch) -> (grads, loss, targets); the loss is the mean over the batch's targets."""
    specs = parameter_specs(config.model)
    sum_of_losses = _sum_of_losses(config, mesh)
    micro_batches = config.optimizer.accumulation_steps

    def on_device(params, batch):
        once = micro_batches > 1  # gradients are summed over dp after all micro-batches, not in each
        if once:
            params = vary_over(params, frozenset({DATA}))

        def add_micro_batch(carry, micro_batch):
            (nats, targets), grads = jax.value_and_grad(sum_of_losses, has_aux=True)(params, micro_batch)
            return jax.tree.map(jnp.add, carry, (grads, nats, targets)), None

        split = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        zero = (_zeros_varying_like(params), jnp.float32(0), jnp.float32(0))
        (grads, nats, targets), _ = lax.scan(add_micro_batch, zero, split, unroll=micro_batches == 1)
        if once:
            grads = lax.psum(grads, DATA)
        count = jnp.maximum(targets, 1)
        return jax.tree.map(lambda g: g / count, grads), nats / count, targets

    out_specs = (specs, PartitionSpec(), PartitionSpec())
    return jax.shard_map(on_device, mesh=mesh, in_specs=(specs, BATCH_SPEC), out_specs=out_specs)


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
