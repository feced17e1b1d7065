"""Token-wise work a chunk of tokens at a time, so that what it makes on the way exists for one chunk only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.checks import is_whole, require, require_array, shown


def blockwise_feedforward(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, *, chunk_size: int, keep_products: bool = False
) -> jax.Array:
    """Apply a token-wise `fn` to `x` in chunks (Liu & Abbeel 2023, Blockwise Parallel Transformer).

    Args:
      fn: maps [..., c, M] to [..., c, N], each token by itself. It runs again in the backward pass, chunk by chunk.
      x: [..., T, M]. The token axis must not be sharded: inside a `shard_map` it is this device's slice.
      chunk_size: tokens of a chunk, positive. Where it does not divide T, the last chunk is shorter.
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
    return map_chunks(fn, x, axis=x.ndim - 2, chunk_size=chunk_size, keep_products=keep_products)


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
    whole = is_whole(chunk_size, 1)
    require(whole, f"chunk_size={shown(chunk_size)} must be positive and whole; use {tokens} for a single chunk")
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
