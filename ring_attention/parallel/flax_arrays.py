"""Flax's arrays, with any number of axes before the tokens and masks of its form, as arrays with one batch axis."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ring_attention.attention.axis_types import names_of, type_of


def folded(x, trailing: int):
    """`x` with all axes but the last `trailing` as one, which is sharded over what shards any of them."""
    shape = (-1, *x.shape[-trailing:])
    typed = None if x.ndim == trailing + 1 else type_of(x)
    if typed is None:
        return x.reshape(shape)
    rows, last = typed.spec[: x.ndim - trailing], typed.spec[x.ndim - trailing :]
    names = tuple(name for entry in rows for name in names_of(entry))
    sharding = NamedSharding(typed.mesh, PartitionSpec(names or None, *last))
    return jax.lax.reshape(x, (math.prod(x.shape[:-trailing]), *shape[1:]), out_sharding=sharding)


def folded_rows(of_tokens):
    """Arrays [...,T], one or several, with all axes but the last as one; those with one already as they are."""
    return jax.tree.map(lambda x: x if x.ndim < 3 else folded(x, 1), of_tokens)


def validity(mask, query, key):
    """Bool [...,T] where Flax's `mask` [...,1,1,T] says of each key alone whether it is seen, else None."""
    shape, tokens = getattr(mask, "shape", ()), getattr(key, "shape", (0, 0, 0))[-3:-2]
    if len(shape) < 3 or shape[-3:] != (1, 1, *tokens) or query.shape[-3:-2] != tokens or tokens == (1,):
        return None
    return jnp.broadcast_to(jnp.asarray(mask, bool)[..., 0, 0, :], (*query.shape[:-3], *tokens))


def unfolded(out_BTHD, like):
    """`out_BTHD` with the axes of `like` before its tokens, sharded like them."""
    typed = None if like.ndim == out_BTHD.ndim else type_of(out_BTHD)
    if typed is None:
        return out_BTHD.reshape(like.shape)
    rows = [*jax.typeof(like).sharding.spec, *[None] * like.ndim][: like.ndim - 3]
    sharding = NamedSharding(typed.mesh, PartitionSpec(*rows, *typed.spec[1:]))
    return jax.lax.reshape(out_BTHD, like.shape, out_sharding=sharding)
