"""Feed-forward a chunk of tokens at a time, so that its hidden activations exist for one chunk only."""

from collections.abc import Callable

import jax
from einops import rearrange
from jax import lax

from ring_attention.checks import require


def blockwise_feedforward(fn: Callable[[jax.Array], jax.Array], x: jax.Array, *, chunk_size: int) -> jax.Array:
    """Apply a token-wise `fn` to `x` in chunks (Liu & Abbeel 2023, Blockwise Parallel Transformer).

    Args:
      fn: maps [..., c, M] to [..., c, N], each token by itself. It runs again in the backward pass, chunk by chunk.
      x: [..., T, M]. The token axis must not be sharded: inside a `shard_map` it is this device's slice.
      chunk_size: tokens of a chunk, positive. The last chunk is shorter where it does not divide T.

    Returns:
      [..., T, N], equal to fn(x). Where T <= chunk_size it is fn(x) with rematerialisation.
    """
    require(chunk_size > 0, f"chunk_size={chunk_size} must be positive; use T={x.shape[-2]} for a single chunk")
    fn = jax.checkpoint(fn)
    T = x.shape[-2]
    whole = T - T % chunk_size
    if whole <= chunk_size and whole == T or T < chunk_size:
        return fn(x)
    chunks = rearrange(x[..., :whole, :], "... (n c) m -> n ... c m", c=chunk_size)
    y = rearrange(lax.map(fn, chunks), "n ... c m -> ... (n c) m")
    return y if whole == T else lax.concatenate([y, fn(x[..., whole:, :])], dimension=x.ndim - 2)
