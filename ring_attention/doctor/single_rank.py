"""What one device of a ring computes, without the others: to test and time a kernel where there is one device.

The hops are those of `parallel.ring_pass` without a window, in its order; blocks are at hand instead of on their way.
With a window, too, every block is met whole, where a ring would leave out what nobody sees.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import GlobalStats, Kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Tokens
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.parallel.layouts import SequenceLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleRank:
    """One of P devices. Its queries are q [B,H,t,D]; k and v are those of all of them, [P,B,K,t,D].

    Attributes:
      kernel, blocks: how a hop is computed.
      layout: of the sequence over the P devices.
    """

    kernel: Kernel
    layout: SequenceLayout
    blocks: BlockSizes = BlockSizes()

    def forward(self, place, q, k, v, segments, mask: MaskSpec) -> tuple[jax.Array, jax.Array]:
        """Out [B,H,t,D] in the dtype of q and lse [B,H,t], float32, over all keys.

        Args:
          place: number of the device, int32, may be traced.
          segments: int32 [P,B,t] or None.
          mask: how a query and a key make a weight.
        """

        def take(state, pair, k, v):
            return self.kernel.forward(q, k, v, pair, state, self.blocks)

        def step(state, number):
            source, pair = self._remote(place, number, segments, q, mask)
            return take(state, pair, k[source], v[source]), None

        local = self._local(place, segments, q, mask, 0, q.shape[2])
        state = take(SoftmaxState.empty(q.shape), local, k[place], v[place])
        state, _ = lax.scan(step, state, jnp.arange(1, self.layout.ring_size))
        out, lse = online_softmax.finalize(state)
        return out.astype(q.dtype), lse

    def backward(self, place, q, k, v, segments, mask: MaskSpec, out, lse, dout):
        """float32 dq [B,H,t,D], and the share of this device's queries in the (dk, dv) of each, [B,K,t,D].

        These are in the order of the hops: number n is of the device n places before. They are not put into one array,
        which would be copied at every hop.
        """
        stats, length = GlobalStats.of(out, lse, dout), q.shape[2]

        def take(dq, pair, k, v):
            dq, *dkv = self.kernel.backward(q, k, v, stats, pair, dq, self.blocks)
            return dq, dkv

        def local(dq, start, stop):
            here = slice(start, stop)
            pair = self._local(place, segments, q, mask, start, stop)
            return take(dq, pair, k[place][:, :, here], v[place][:, :, here])

        remote, cut = [], self.kernel.halve(length, self.blocks)
        dq, later = local(jnp.zeros(q.shape, jnp.float32), cut, length)
        for number in range(1, self.layout.ring_size):
            source, pair = self._remote(place, number, segments, q, mask)
            dq, dkv = take(dq, pair, k[source], v[source])
            dq = lax.optimization_barrier(dq)  # a ring has it after each hop, and cannot add up all at its end
            remote.append(dkv)
        dq, earlier = local(dq, 0, cut)
        here = [jnp.concatenate(halves, 2) for halves in zip(earlier, later, strict=True)]
        return dq, [here, *remote]

    def _tokens(self, place, segments, length: int, start: int, stop: int) -> Tokens:
        positions = self.layout.shard_positions(place, length)[None, start:stop]
        segments = None if segments is None else segments[place][:, start:stop]
        return Tokens(positions, segments, self.layout.runs(length, start, stop))

    def _local(self, place, segments, q, mask: MaskSpec, start: int, stop: int) -> BlockPair:
        """Return the queries and some keys of the same shard."""
        length = q.shape[2]
        queries = self._tokens(place, segments, length, 0, length)
        return BlockPair(queries, self._tokens(place, segments, length, start, stop), mask, diagonal=True)

    def _remote(self, place, number, segments, q, mask: MaskSpec):
        """Return the device whose block comes `number` hops, and its block pair."""
        length, source = q.shape[2], (place - number) % self.layout.ring_size
        tokens = [self._tokens(i, segments, length, 0, length) for i in (place, source)]
        return source, BlockPair(*tokens, mask, diagonal=False)
