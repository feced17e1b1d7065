"""What one device of a ring computes, without the others: to test and time a kernel where there is one device.

The hops are those of `parallel.rotation` without a window, in its order; blocks are at hand instead of on their way.
With a window, too, every block is met whole, where a ring would leave out what nobody sees.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import Kernel, Whole
from ring_attention.attention.masks import Hop, Tokens
from ring_attention.attention.online_softmax import Running
from ring_attention.attention.rule import Rule
from ring_attention.parallel.layouts import SequenceLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoneDevice:
    """One of P devices. Its queries are q [B,H,t,D]; k and v are those of all of them, [P,B,K,t,D].

    Attributes:
      kernel, blocks: how a hop is computed.
      layout: of the sequence over the P devices.
    """

    kernel: Kernel
    layout: SequenceLayout
    blocks: BlockSizes = BlockSizes()

    def forward(self, place, q, k, v, segments, rule: Rule) -> tuple[jax.Array, jax.Array]:
        """Out [B,H,t,D] in the dtype of q and lse [B,H,t], float32, over all keys.

        Args:
          place: number of the device, int32, may be traced.
          segments: int32 [P,B,t] or None.
          rule: of weights.
        """

        def take(running, hop, k, v):
            return self.kernel.forward(q, k, v, hop, running, self.blocks)

        def step(running, number):
            source, hop = self._abroad(place, number, segments, q, rule)
            return take(running, hop, k[source], v[source]), None

        home = self._home(place, segments, q, rule, 0, q.shape[2])
        running = take(Running.empty(q.shape), home, k[place], v[place])
        running, _ = lax.scan(step, running, jnp.arange(1, self.layout.ring_size))
        out, lse = online_softmax.finish(running)
        return out.astype(q.dtype), lse

    def backward(self, place, q, k, v, segments, rule: Rule, out, lse, dout):
        """float32 dq [B,H,t,D], and the share of this device's queries in the (dk, dv) of each, [B,K,t,D].

        These are in the order of the hops: number n is of the device n places before. They are not put into one array,
        which would be copied at every hop.
        """
        whole, length = Whole.of(out, lse, dout), q.shape[2]

        def take(dq, hop, k, v):
            dq, *dkv = self.kernel.backward(q, k, v, whole, hop, dq, self.blocks)
            return dq, dkv

        def at_home(dq, start, stop):
            here = slice(start, stop)
            hop = self._home(place, segments, q, rule, start, stop)
            return take(dq, hop, k[place][:, :, here], v[place][:, :, here])

        abroad, cut = [], self.kernel.halve(length, self.blocks)
        dq, later = at_home(jnp.zeros(q.shape, jnp.float32), cut, length)
        for number in range(1, self.layout.ring_size):
            source, hop = self._abroad(place, number, segments, q, rule)
            dq, dkv = take(dq, hop, k[source], v[source])
            abroad.append(dkv)
        dq, earlier = at_home(dq, 0, cut)
        home = [jnp.concatenate(pair, 2) for pair in zip(earlier, later, strict=True)]
        return dq, [home, *abroad]

    def _tokens(self, place, segments, length: int, start: int, stop: int) -> Tokens:
        positions = self.layout.shard_positions(place, length)[None, start:stop]
        segments = None if segments is None else segments[place][:, start:stop]
        return Tokens(positions, segments, self.layout.runs(length, start, stop))

    def _home(self, place, segments, q, rule: Rule, start: int, stop: int) -> Hop:
        """The queries and some keys of the same shard."""
        length = q.shape[2]
        queries = self._tokens(place, segments, length, 0, length)
        return Hop(queries, self._tokens(place, segments, length, start, stop), rule, own=True)

    def _abroad(self, place, number, segments, q, rule: Rule):
        """The device whose block comes `number` hops, and the meeting with it."""
        length, source = q.shape[2], (place - number) % self.layout.ring_size
        tokens = [self._tokens(i, segments, length, 0, length) for i in (place, source)]
        return source, Hop(*tokens, rule)
