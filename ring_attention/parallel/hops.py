"""How far keys must travel around a ring, found from what the tokens of all devices say: a number, not a program.

Documents, intervals and positions are arrays, so that one compiled program serves every batch. Each device learns
between which bounds the tokens of all others lie, a few numbers of each, and so which of them have keys that its
queries see. What any device needs is passed on as far as that, on all devices alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import get_abstract_mesh

from ring_attention.attention.masks import EMPTY, Bounds, Tokens, kinds_between
from ring_attention.attention.varying import vary_over
from ring_attention.parallel.strategy import Context, Hops, ShardTokens

PIECES = 32
"""Into how many pieces a shard is cut, of which the bounds are compared: more of them see less that is not there."""


def count_hops(context: Context, tokens: ShardTokens, shard_len: int) -> Hops:
    """The fewest hops that bring every key to all queries that see it, the same on every device of the mesh.

    Args:
      context: devices and layout.
      tokens: of this device.
      shard_len: tokens of a shard, where the layout tells positions.
    """
    P, width, name = context.layout.ring_size, context.width, context.axis_name
    place = lax.div(lax.axis_index(name), np.int32(width))

    def bounds(side: Tokens) -> Bounds:
        side = context.placed(side, place, shard_len)
        length = side.positions.shape[1]
        size = -(-length // PIECES)
        return Bounds.of(side.pad(-length % size).tiles(size))

    queries, keys = bounds(tokens.queries), bounds(tokens.keys)
    of_places = jax.tree.map(lambda x: lax.all_gather(x, name)[::width], keys)
    seen = jax.vmap(lambda keys: (kinds_between(tokens.mask, queries, keys) != EMPTY).any())(of_places)
    sources = lax.rem(place - jnp.arange(P, dtype=jnp.int32) + P, np.int32(P))
    return _fewest(_anywhere(seen[sources].astype(jnp.int32), name) > 0)


def _anywhere(needed: jax.Array, axis_name: str) -> jax.Array:
    """The maximum over all devices that run this program together: those of other rings go as far, too.

    A loop of which some devices do fewer steps would leave others waiting in its transfers.
    """
    axes = frozenset(get_abstract_mesh().manual_axes)
    needed = vary_over(needed, axes) if axis_name in axes else needed
    return lax.pmax(needed, tuple(sorted(axes | {axis_name})))


def _fewest(needed: jax.Array) -> Hops:
    """The fewest hops forth and back that reach all shifts s with needed[s], back as few of them as possible."""
    shifts = np.arange(needed.size, dtype=np.int32)
    beyond = (shifts[None, :] > shifts[:, None]) & needed[None, :]
    back = jnp.where(beyond, needed.size - shifts, 0).max(1)  # by hops forth
    forth = jnp.argmin((shifts + back) * needed.size + back).astype(jnp.int32)
    return Hops(forth, back[forth].astype(jnp.int32))
