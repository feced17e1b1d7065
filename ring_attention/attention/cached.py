"""Attention of a few queries to a long cache of keys and values on one device: a pass over the slots that are seen.

Decoding has one query a head and row, so the time goes into reading the cache. It is read where it lies, a tile of
slots at a time, once: to put its heads first, as the kernels of training want them, would copy all of it for every
token. Tiles that no row of the batch sees are not read: those beyond the end of every row, those behind the window.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from ring_attention.attention import online_softmax
from ring_attention.attention.derivatives import differentiated_once
from ring_attention.attention.kernels.tiling import Worklist
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import EMPTY, BlockPair, Tokens, tile_kinds
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.token_args import FARTHEST
from ring_attention.attention.varying import axes_of, vary_over, vary_together
from ring_attention.attention.weights import BlockScores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer.

    Attributes:
      k, v: [B,s,K,D], with `heads_first` [B,K,s,D]; where `layer` is given those of all layers, with an axis L before.
        In the dtype of the queries, or (half precision) its bits, `as_bits`.
      layer: int32, which of them is meant. To slice it out would copy it.
      heads_first: as the products take them. XLA for GPU puts heads first by itself, by a copy of the whole cache.
    """

    k: jax.Array
    v: jax.Array
    layer: jax.Array | None = None
    heads_first: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_kv_heads(self) -> int:
        """K, of this device."""
        return self.k.shape[-3 if self.heads_first else -2]

    @property
    def slots(self) -> int:
        """s, tokens that there is room for on this device."""
        return self.k.shape[-2 if self.heads_first else -3]

    def read(self, start: jax.Array, size: int, dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B,K,size,D] of the slots from `start` on."""

        def tile(x):
            axis = x.ndim - (2 if self.heads_first else 3)
            starts, sizes = [np.int32(0)] * x.ndim, list(x.shape)
            starts[axis], sizes[axis] = start, size
            if self.layer is not None:
                starts[0], sizes[0] = self.layer, 1
            x = lax.dynamic_slice(x, starts, sizes)
            x = x[0] if self.layer is not None else x
            x = x if self.heads_first else jnp.swapaxes(x, 1, 2)
            return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)

        return tile(self.k), tile(self.v)


def as_bits(x: jax.Array) -> jax.Array:
    """Half-precision numbers as uint16, others as they are.

    To slice or update an array of bfloat16 the CPU's compiler widens all of it to float32; a cache that is written and
    read tile by tile would be copied for every token and layer. Elsewhere this costs nothing.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def attend_cached(
    q_BTHD: jax.Array, cache: Cache, *, mask: MaskSpec, q_positions: jax.Array, kv_positions: jax.Array, size: int
) -> SoftmaxState:
    """The statistics of queries over the slots that they see; the scores of all of them with one tile exist at once.

    Args:
      q_BTHD: a few tokens.
      cache: of B rows.
      mask: how a query and a key make a weight.
      q_positions: int32 [B,T].
      kv_positions: int32 [B or 1, s], of the slots; a slot at FARTHEST is not seen, whatever it holds.
      size: slots of a tile.

    Returns:
      Statistics [B,H,T,...].
    """
    q = rearrange(q_BTHD, "B T (K G) D -> B K G T D", K=cache.num_kv_heads)
    arrays = vary_together(q, cache.k, cache.v, (cache.layer, mask, q_positions, kv_positions))
    state: Any = _attend((min(size, cache.slots), cache.heads_first), *arrays)
    return SoftmaxState._make(rearrange(x, "B K G T ... -> B (K G) T ...") for x in state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: tuple[int, bool], q, k, v, others) -> SoftmaxState:
    """Statistics [B,K,G,T,...]; `static` are the size of a tile and `heads_first`."""
    return _over_tiles(static, q, k, v, others, seen_alone=True)


def _attend_forward(static, q, k, v, others):
    return _over_tiles(static, q, k, v, others, seen_alone=True), (q, k, v, others)


def _attend_backward(static, residuals, cotangents):
    """By differentiating a pass over all tiles: how many are seen is known too late for JAX to keep what it needs."""
    *arrays, others = residuals
    _, vjp = jax.vjp(lambda q, k, v: _over_tiles(static, q, k, v, others, seen_alone=False), *arrays)
    return *map(differentiated_once, vjp(cotangents)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _over_tiles(static: tuple[int, bool], q, k, v, others, *, seen_alone: bool) -> SoftmaxState:
    """A pass over the tiles that are seen, or over all of them."""
    (size, heads_first), (layer, mask, q_positions, kv_positions) = static, others
    cache = Cache(k, v, layer, heads_first)
    visited = _visited(mask, q_positions, kv_positions, size)
    slopes = None if mask.slopes is None else rearrange(mask.slopes, "(K G) -> 1 K G 1 1", K=cache.num_kv_heads)
    visited, state = vary_over((visited, SoftmaxState.empty(q.shape)), axes_of((q, k, v, others)))
    queries = Tokens(q_positions[:, None, None, :, None])  # against slots [B or 1,1,1,1,s]

    def take(number, state):
        wanted = number * size
        start = jnp.minimum(wanted, cache.slots - size)  # the last tile may reach back into the one before
        k, v = cache.read(start, size, q.dtype)
        positions = lax.dynamic_slice_in_dim(kv_positions, start, size, axis=1)
        slots = start + jnp.arange(size, dtype=jnp.int32)
        positions = jnp.where(slots[None] < wanted, FARTHEST, positions)  # those taken already
        block = BlockScores(
            mask, queries, Tokens(positions[:, None, None, None]), slopes, batch=None, heads=None, masked=True
        )
        scores, _ = block.scores(jnp.einsum("BKGTD,BKsD->BKGTs", q, k, preferred_element_type=jnp.float32))
        return jax.vmap(jax.vmap(online_softmax.update))(state, scores, v)

    if seen_alone:
        return lax.fori_loop(0, visited.count, lambda i, state: take(visited.items[i], state), state)
    numbers = jnp.arange(visited.items.size, dtype=jnp.int32)
    return lax.scan(lambda state, number: (take(number, state), None), state, numbers)[0]


def _visited(mask: MaskSpec, q_positions: jax.Array, kv_positions: jax.Array, size: int) -> Worklist:
    """The tiles of slots of which any row may see one."""
    keys = Tokens(kv_positions).pad(-kv_positions.shape[1] % size)
    tiles = BlockPair(Tokens(q_positions).tiles(q_positions.shape[1]), Tokens(keys.positions).tiles(size), mask)
    return Worklist.of((tile_kinds(tiles) != EMPTY).any((0, 1)))
