"""What travels around a ring and when: the forward and the backward pass over the shards of a sequence.

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

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import GlobalStats, Kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Tokens
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.routes import Route


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingPass:
    """An exchange (see `exchange`) in which keys and values go around and queries stay.

    Attributes:
      axis_name: of the devices.
      layout: of the sequence over the places of the ring.
      routes: which part of each shard goes how far, and which way.
      unroll: write the steps out rather than loop over them.
      kernel, blocks: how a block pair is computed.
      width: how many consecutive devices share a place, each going around a ring of its own with its heads.
    """

    axis_name: str
    layout: SequenceLayout
    routes: tuple[Route, ...]
    unroll: bool
    kernel: Kernel
    blocks: BlockSizes
    width: int = 1

    def forward(self, me, q, k, v, segments, mask: MaskSpec) -> SoftmaxState:
        """Statistics of this device's queries over all keys that they see."""
        length = q.shape[2]

        def take(state, block, pair: BlockPair):
            return self.kernel.forward(q, *block[:2], pair, state, self.blocks)

        def advance(carry, step, active, going_on):
            state, blocks = carry
            following = {i: self.pass_on(i, blocks[i]) for i in going_on}
            state, following = self.after(state, following)
            for i in active:
                pair = self.pair(me, mask, segments, length, blocks[i][2], self.routes[i], step)
                state = take(state, blocks[i], pair)
            return state, following

        arriving = {i: self.pass_on(i, self.part(i, k, v, segments)) for i in range(len(self.routes))}
        pair = self.local_pair(me, mask, segments, length, 0, length)
        state, arriving = self.after(vary_over(SoftmaxState.empty(q.shape), axes_of(q)), arriving)
        state = take(state, (k, v), pair)
        state, _ = self.run(advance, (state, arriving), first=1)
        return state

    def backward(self, me, q, k, v, segments, mask: MaskSpec, stats: GlobalStats):
        """Gradients. dK and dV of a block follow it around the ring, each hop's part added, and are then sent home.

        While a hop is computed, what the hop before gave is on its way. The local keys are computed while nothing
        else could be: one half while the first block arrives, the other while the gradients of remote keys return.
        Left to itself a compiler may put them beside a transfer that has a hop already, so what follows is made to
        wait.
        """
        length = q.shape[2]

        def gradients(dq, block, pair: BlockPair):
            dq, *dblock = self.kernel.backward(q, *block[:2], stats, pair, dq, self.blocks)
            return dq, dblock

        def local(dq, kv, start: int, stop: int):
            if start == stop:
                return dq, [x[:, :, :0].astype(jnp.float32) for x in kv]
            block = [x[:, :, start:stop] for x in kv]
            return gradients(dq, block, self.local_pair(me, mask, segments, length, start, stop))

        def advance(carry, step, active, going_on):
            dq, blocks, dblocks, returned = carry
            following = {i: self.pass_on(i, blocks[i]) for i in going_on}
            dq, following = self.after(dq, following)
            arriving = {i: lax.optimization_barrier(self.pass_on(i, dblocks[i])) for i in active if i in dblocks}
            gathered = {}
            for i in active:
                pair = self.pair(me, mask, segments, length, blocks[i][2], self.routes[i], step)
                dq, here = gradients(dq, blocks[i], pair)
                gathered[i] = jax.tree.map(jnp.add, arriving[i], here) if i in arriving else here
            back = {i: self.send_home(i, gathered[i]) for i in active if i not in going_on}
            return dq, following, {i: gathered[i] for i in going_on}, returned | back

        dq = vary_over(jnp.zeros(q.shape, jnp.float32), axes_of(q))
        if not self.routes:
            dq, (dk, dv) = local(dq, (k, v), 0, length)
            return dq, dk, dv
        cut = self.kernel.halve(length, self.blocks)
        arriving = {i: self.pass_on(i, self.part(i, k, v, segments)) for i in range(len(self.routes))}
        dq, arriving = self.after(dq, arriving)
        dq, later = local(dq, (k, v), cut, length)  # in most layouts the half that fewer queries see
        dq, later, arriving = lax.optimization_barrier((dq, later, arriving))
        carry = (dq, arriving, {}, {})  # nothing has been gathered yet that could be on its way
        carry = advance(carry, 1, range(len(self.routes)), self.beyond_first)
        dq, _, _, returned = self.run(advance, carry, first=2)
        dq, kv = lax.optimization_barrier((dq, (k, v)))
        dq, returned = self.after(dq, returned)
        dq, earlier = local(dq, kv, 0, cut)
        dk, dv = (jnp.concatenate(halves, 2) for halves in zip(earlier, later, strict=True))
        for i, (dk_part, dv_part) in returned.items():
            here = slice(self.routes[i].start, self.routes[i].stop)
            dk, dv = dk.at[:, :, here].add(dk_part), dv.at[:, :, here].add(dv_part)
        return dq, dk, dv

    def after(self, results, arriving):
        """Both; the results of hops so far not before what is on its way is there, if the kernel asks for that."""
        return lax.optimization_barrier((results, arriving)) if self.kernel.merge_waits else (results, arriving)

    def send(self, tree, shift: int):
        """Pass every array on to the device `shift` places further, all of them as one.

        Where nothing binds them together, XLA for GPU joins the V of one hop with the K of the next into a transfer
        that no hop is left to hide.
        """
        devices = self.layout.ring_size * self.width
        pairs = [(i, (i + shift * self.width) % devices) for i in range(devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, pairs), tree)

    def pair(self, me, mask: MaskSpec, q_segments, length: int, k_segments, route: Route, step) -> BlockPair:
        """Where the resident queries stand, and the keys that came along `route` in this step."""
        P = self.layout.ring_size
        source = lax.rem(self._place(me) - route.direction * step + P, np.int32(P))
        keys = self.layout.shard_positions(source, length)[None, route.start : route.stop]
        runs = self.layout.runs(length, route.start, route.stop)
        return BlockPair(self._queries(me, q_segments, length), Tokens(keys, k_segments, runs), mask)

    def local_pair(self, me, mask: MaskSpec, segments, length: int, start: int, stop: int) -> BlockPair:
        """Where the resident queries stand, and the keys from `start` to `stop` of the same shard."""
        queries = self._queries(me, segments, length)
        positions, segments = (None if x is None else x[:, start:stop] for x in (queries.positions, segments))
        return BlockPair(
            queries, Tokens(positions, segments, self.layout.runs(length, start, stop)), mask, diagonal=True
        )

    def _queries(self, me, segments, length: int) -> Tokens:
        positions = self.layout.shard_positions(self._place(me), length)[None]
        return Tokens(positions, segments, self.layout.runs(length))

    def _place(self, me):
        """Number of a device's place in the ring."""
        return lax.div(me, np.int32(self.width))

    def part(self, number: int, k, v, segments):
        """The tokens of an own block that take route `number`."""
        here = slice(self.routes[number].start, self.routes[number].stop)
        return k[:, :, here], v[:, :, here], None if segments is None else segments[:, here]

    def pass_on(self, number: int, tree):
        """One hop along a route."""
        return self.send(tree, self.routes[number].direction)

    def send_home(self, number: int, tree):
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
    def beyond_first(self) -> list[int]:
        """Numbers of the routes of more than one hop."""
        return [number for number, route in enumerate(self.routes) if route.hops > 1]
