"""Token-wise work a chunk of tokens at a time, so that what it makes on the way exists for one chunk only."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import get_abstract_mesh

from ring_attention.attention.axis_types import names_of
from ring_attention.checks import is_whole, require, require_array, shown


def blockwise_feedforward(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, *, chunk_size: int, keep_products: bool = False
) -> jax.Array:
    """Apply a token-wise `fn` to `x` in chunks (Liu & Abbeel 2023, Blockwise Parallel Transformer).

    Args:
      fn: maps [..., c, M] to [..., c, N], each token by itself. It runs again in the backward pass, chunk by chunk.
      x: [..., T, M], of which any axis may be sharded, by `jit` or by Explicit axes of a mesh; inside a `shard_map` it
        is this device's slice.
      chunk_size: tokens of a chunk, positive. Outside a `shard_map` each chunk takes tokens from all over the sequence,
        so that devices which share it out each compute their own, and chunks may be smaller, so that they are alike.
      keep_products: keep what products of matrices give for the backward pass, which then need not run again: faster,
        but of all tokens at once.

    Returns:
      [..., T, N], equal to fn(x).

    Raises:
      ValueError: for a chunk size that is not positive, and for what is no function or no such array.
    """
    require(
        callable(fn), f"fn is {shown(fn)}, need a function of [..., tokens, features]; pass jax.nn.silu or your own"
    )
    require_array("x", x)
    require(
        x.ndim >= 2, f"x has shape {x.shape}, need [..., tokens, features]; give it an axis of tokens before the last"
    )
    *rows, tokens, features = x.shape
    _check_chunk_size(chunk_size, tokens)
    count = 0 if get_abstract_mesh().are_all_axes_manual else _interleaved_chunks(x, chunk_size)
    if count == 0:
        return map_chunks(fn, x, axis=x.ndim - 2, chunk_size=chunk_size, keep_products=keep_products)
    # Every count-th token makes a chunk, so that what shards the tokens shards each chunk: a loop over consecutive ones
    # would go from device to device, each chunk be sent to all of them and computed by all.
    interleaved = x.reshape(*rows, tokens // count, count, features)
    out = map_chunks(
        lambda chunk: jnp.expand_dims(fn(chunk.squeeze(-2)), -2),
        interleaved,
        axis=interleaved.ndim - 2,
        chunk_size=1,
        keep_products=keep_products,
    )
    return out.reshape(*rows, tokens, out.shape[-1])


def _interleaved_chunks(x: jax.Array, chunk_size: int) -> int:
    """Into how many chunks of equally spaced tokens `x` falls; 0 where one holds all, or there is no such divisor.

    They are no longer than `chunk_size`, but that each device has a token of each, if types say how many devices there
    are. Where they do not, as in `jit`, the chunks are a multiple of a power of two, as numbers of devices mostly are.
    """
    tokens = x.shape[-2]
    least = -(-tokens // chunk_size)
    if least <= 1:
        return 0
    typed = jax.typeof(x).sharding
    shards = math.prod(typed.mesh.shape[name] for name in names_of([*typed.spec, *[None] * x.ndim][x.ndim - 2]))
    if shards > 1:
        own = tokens // shards
        return next(count for count in range(min(least, own), own + 1) if own % count == 0)
    if tokens % chunk_size == 0:
        return least
    counts = [count for count in range(least, 2 * least) if tokens % count == 0]
    return max(counts, key=lambda count: (tokens // count) & -(tokens // count), default=0)


def _check_chunk_size(chunk_size, tokens: int) -> None:
    whole = is_whole(chunk_size, 1)
    require(whole, f"chunk_size={shown(chunk_size)} must be positive and whole; use {tokens} for a single chunk")


def map_chunks(fn: Callable, tree, *, axis: int, chunk_size: int, keep_products: bool = False):
    """`fn(tree)` for a token-wise `fn` of arrays that all have the tokens on `axis`, a chunk at a time.

    `fn` is rematerialised: the backward pass keeps `tree` and runs `fn` again for one chunk after the other, all of it
    or, with `keep_products`, what stands between its products of matrices.
    """
    policy = jax.checkpoint_policies.dots_saveable if keep_products else None
    fn = jax.checkpoint(fn, policy=policy)
    return scan_chunks(lambda nothing, chunk: (nothing, fn(chunk)), (), tree, axis=axis, chunk_size=chunk_size)[1]


def scan_chunks(fn: Callable, carry, tree, *, axis: int, chunk_size: int):
    """`lax.scan` over chunks of tokens: fn(carry, chunk) -> (carry, result), `result` token-wise as `tree` is.

    Returns:
      The last carry, and the results of all chunks, tokens on `axis`.
    """
    tokens = jax.tree.leaves(tree)[0].shape[axis]
    _check_chunk_size(chunk_size, tokens)
    count, rest = divmod(tokens, chunk_size)
    if count + (rest > 0) <= 1:
        return fn(carry, tree)

    def split(x):
        whole = lax.slice_in_dim(x, 0, count * chunk_size, axis=axis)
        return jnp.moveaxis(whole.reshape(*x.shape[:axis], count, chunk_size, *x.shape[axis + 1 :]), axis, 0)

    def join(x):
        chunks = jnp.moveaxis(x, 0, axis)
        return chunks.reshape(*chunks.shape[:axis], count * chunk_size, *chunks.shape[axis + 2 :])

    carry, result = lax.scan(fn, carry, jax.tree.map(split, tree))
    result = jax.tree.map(join, result)
    if rest == 0:
        return carry, result
    carry, tail = fn(carry, jax.tree.map(lambda x: lax.slice_in_dim(x, tokens - rest, tokens, axis=axis), tree))
    return carry, jax.tree.map(lambda x, y: lax.concatenate([x, y], dimension=axis), result, tail)
