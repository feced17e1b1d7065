"""Programs compiled for devices that need not be there, from shapes alone."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ring_attention.data.packing import FIELDS
from ring_attention.parallel.context import ring_attention
from ring_attention.parallel.mesh import compiler_options, make_mesh
from ring_attention.training.config import TrainConfig
from ring_attention.training.state import sharded_abstract_state
from ring_attention.training.step import BATCH_SPEC, make_train_step
from ring_attention.training.validate import validate_config


def compile_ring(
    devices: Sequence[jax.Device], *, shard: int, heads: int, kv_heads: int, head_dim: int, dtype="bfloat16", **settings
):
    """Compile a ring of all the devices, forward and backward, as `jax.stages.Compiled`.

    Args:
      devices: the places of the ring, in order.
      shard: tokens of each device.
      heads, kv_heads, head_dim, dtype: those of q, k and v, of one sequence.
      settings: other arguments of `ring_attention`.
    """
    mesh = make_mesh(sp=len(devices), devices=devices)
    sharding = NamedSharding(mesh, jax.P(None, "sp"))
    q, kv = (
        jax.ShapeDtypeStruct((1, len(devices) * shard, number, head_dim), dtype, sharding=sharding)
        for number in (heads, kv_heads)
    )

    def forward_and_backward(q, k, v, dout):
        out, vjp = jax.vjp(functools.partial(ring_attention, mesh=mesh, **settings), q, k, v)
        return out, *vjp(dout)

    return jax.jit(forward_and_backward, compiler_options=compiler_options(mesh)).lower(q, kv, kv, q).compile()


def compile_step(config: TrainConfig, devices: Sequence[jax.Device]):
    """Compile a config's training step, as `jax.stages.Compiled`; raises ConfigError if the devices cannot run it."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    validate_config(config, dict(mesh.shape), mesh.devices.flat[0].platform)
    state = sharded_abstract_state(config, mesh)
    shape = (config.batch_size, config.seq_len)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    return make_train_step(config, mesh).lower(state, dict.fromkeys(FIELDS, batch)).compile()
