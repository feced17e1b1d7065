"""One pass around a ring: what is sent on and when, and where the tokens of the blocks that arrive stand.

Device i of P starts with its own block of keys and values and passes what it holds on, along the ways of `routes`;
where the whole block goes one way round, it holds the block of device i-s at step s. A block is sent on before it is
used, so that the transfer runs beside the computation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_attention.attention.masks import BlockPair, Tokens
from ring_attention.parallel.routes import Route
from ring_attention.parallel.strategy import Context, ShardTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingPass:
    """A device's part in a pass of keys and values around a ring, whose queries stay.

    Attributes:
      context: devices and layout. Where several devices share a place, each is in a ring of its own, with its heads.
      me: int32, this device's number.
      tokens: this device's, and the mask.
      length: s, keys of a shard, of which there are as many as queries where the layout tells positions.
      routes: which part of each shard goes how far, and which way.
      unroll: write the steps out rather than loop over them.
    """

    context: Context
    me: jax.Array
    tokens: ShardTokens
    length: int
    routes: tuple[Route, ...]
    unroll: bool

    def after(self, results, arriving):
        """Both; the results of hops so far not before what is on its way is there, if the kernel asks for that."""
        return lax.optimization_barrier((results, arriving)) if self.context.kernel.merge_waits else (results, arriving)

    def send(self, tree, shift: int):
        """Pass every array on to the device `shift` places further, all of them as one.

        Where nothing binds them together, XLA for GPU joins the V of one hop with the K of the next into a transfer
        that no hop is left to hide.
        """
        devices = self.context.devices
        pairs = [(i, (i + shift * self.context.width) % devices) for i in range(devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.context.axis_name, pairs), tree)

    def remote_pair(self, number: int, keys: Tokens, step) -> BlockPair:
        """The pair of local queries and the keys that came along route `number` in this step."""
        route = self.routes[number]
        keys = self.keys_from(route.direction * step, keys, route.start, route.stop)
        return BlockPair(self._queries(), keys, self.tokens.mask, diagonal=False)

    def pair_from(self, shift, keys: Tokens) -> BlockPair:
        """The pair of local queries and all keys of the device `shift` places before; traced, between -P and P."""
        return BlockPair(self._queries(), self.keys_from(shift, keys), self.tokens.mask)

    def keys_from(self, shift, keys: Tokens, start: int = 0, stop: int | None = None) -> Tokens:
        """Those keys, some of the shard of the device `shift` places before, with their positions."""
        P = np.int32(self.context.layout.ring_size)
        return self.context.placed(keys, lax.rem(self._place() - shift + P, P), self.length, start, stop)

    def local_pair(self, start: int, stop: int) -> BlockPair:
        """The pair of local queries and the local keys from `start` to `stop`."""
        keys = jax.tree.map(lambda x: x[:, start:stop], self.tokens.keys)
        keys = self.context.placed(keys, self._place(), self.length, start, stop)
        return BlockPair(self._queries(), keys, self.tokens.mask, diagonal=True)

    def _queries(self) -> Tokens:
        return self.context.placed(self.tokens.queries, self._place(), self.length)

    def _place(self):
        """The number of this device's place in the ring."""
        return lax.div(self.me, np.int32(self.context.width))

    def part(self, number: int, k, v) -> tuple:
        """Keys and values of this device that leave along route `number`, and what is said of them."""
        here = slice(self.routes[number].start, self.routes[number].stop)
        return k[:, :, here], v[:, :, here], jax.tree.map(lambda x: x[:, here], self.tokens.keys)

    def pass_on(self, number: int, tree):
        """One hop along a route."""
        return self.send(tree, self.routes[number].direction)

    def send_back(self, number: int, tree):
        """All the way back from the end of a route."""
        route = self.routes[number]
        return self.send(tree, -route.direction * route.hops)

    def run(self, advance, carry, first: int):
        """`advance(carry, step, active, going_on) -> carry` for the steps from `first` to the end of the last route.

        `active` are the numbers of the routes on which blocks arrive at that step, `going_on` of those that pass them
        on after it. Steps that are alike form a loop: in an unrolled ring the CPU's compiler starts all transfers at
        once, so that memory grows with P.
        """
        hops = [route.hops for route in self.routes]
        for last in sorted({count for count in hops if count >= first}):
            active = [number for number, count in enumerate(hops) if count >= last]
            alike = functools.partial(advance, active=active, going_on=active)
            if self.unroll:
                for step in range(first, last):
                    carry = alike(carry, step)
            elif first < last:
                carry, _ = lax.scan(
                    lambda c, step, fn=alike: (fn(c, step), None), carry, jnp.arange(first, last, dtype=jnp.int32)
                )
            carry = advance(carry, last, active=active, going_on=[i for i in active if hops[i] > last])
            first = last + 1
        return carry

    @property
    def one_way(self) -> bool:
        """Whether no query sees keys of a later place, whatever the arrays say."""
        tokens, mask = self.tokens, self.tokens.mask
        more = jax.tree.leaves(dataclasses.replace(tokens.queries, segments=None))  # positions, or what else they see
        return mask.causal and self.context.layout.kind == "contiguous" and not more

    @property
    def longer_routes(self) -> list[int]:
        """Numbers of the routes of more than one hop."""
        return [number for number, route in enumerate(self.routes) if route.hops > 1]
