"""A ring whose number of hops is known as it runs (`hops`): loops of as many steps, what is not needed is not sent.

Keys first go from place to place until they have been wherever later places need them, then the own keys start again
the other way. In the loops a block is sent on while it is computed with, as in any ring.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.parallel.ring_pass import RingPass
from ring_attention.parallel.strategy import Hops

FORTH, BACK = 1, -1


def forward(ring: RingPass, q, k, v, hops: Hops) -> SoftmaxState:
    """The softmax state of this device's queries over all keys that they see."""
    kernel, own = ring.context.kernel, (k, v, ring.tokens.keys)

    def take(state, block, shift):
        return kernel.forward(q, *block[:2], ring.pair_from(shift, block[2]), state, ring.context.blocks)

    def step(direction: int):
        def advance(number, carry):
            state, block, shift = carry
            leaving = block
            if direction == BACK:  # the first to leave are the own keys, while the last that came forth are used
                leaving = jax.tree.map(lambda mine, x: jnp.where(number == 0, mine, x), own, block)
            following = ring.send(leaving, direction)
            state, following = ring.after(state, following)
            return take(state, block, shift), following, direction * (number + 1)

        return advance

    carry = (SoftmaxState.before(q, v), own, np.int32(0))
    with _planned(ring.routes[0].hops):
        carry = lax.fori_loop(np.int32(0), hops.forth, step(FORTH), carry)
    if not ring.one_way:
        with _planned(0):
            carry = lax.fori_loop(np.int32(0), hops.back, step(BACK), carry)
    return take(*carry)


def backward(ring: RingPass, q, k, v, stats: GlobalStats, hops: Hops):
    """Gradients. dK and dV follow their block a hop behind it, each hop's part added, and are then sent home."""
    own = (k, v, ring.tokens.keys)
    dq = vary_over(jnp.zeros(q.shape, jnp.float32), axes_of(q))
    nothing = vary_over(tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v)), axes_of((q, k)))
    dq, here, gathered = _stream(ring, q, stats, (dq, own, nothing, nothing), hops.forth, FORTH)
    dkv = jax.tree.map(jnp.add, here, _sent_home(ring, gathered, hops.forth, FORTH))
    if not ring.one_way:
        first = _repeat(jnp.minimum(hops.back, 1), lambda _, block: ring.send(block, BACK), own, planned=0)
        dq, _, gathered = _stream(ring, q, stats, (dq, first, nothing, nothing), hops.back, BACK)
        dkv = jax.tree.map(jnp.add, dkv, _sent_home(ring, gathered, hops.back, BACK))
    return dq, *dkv


def _stream(ring: RingPass, q, stats: GlobalStats, carry, hops, direction: int):
    """(dq, earlier, gathered) after so many hops: gradients of the block that was there first, and of the last one.

    Forth the first one are the own keys; where there is no hop they are the last, and `earlier` is nothing. Back the
    first one came with the first hop. There are loops of one step where others would branch, as transfers in a branch
    would not run beside the computation.

    Args:
      ring: the pass.
      q, stats: of this device's queries.
      carry: dq, the first block, and twice zeros like the float32 gradients of its keys and values.
      hops: int32.
      direction: of the hops.
    """
    kernel, first = ring.context.kernel, 0 if direction == FORTH else 1

    def gradients(dq, block, number):
        pair = ring.pair_from(direction * number, block[2])
        dq, *dkv = kernel.backward(q, *block[:2], stats, pair, dq, ring.context.blocks)
        return dq, tuple(dkv)

    def step(*, passes_on: bool, gathers: bool):
        def advance(number, carry):
            dq, block, earlier, gathered = carry
            following = ring.send(block, direction) if passes_on else block
            dq, following = ring.after(dq, following)
            arriving = lax.optimization_barrier(ring.send(gathered, direction)) if gathers else None
            dq, here = gradients(dq, block, number)
            if gathers:
                return dq, following, earlier, jax.tree.map(jnp.add, arriving, here)
            return dq, following, gathered, here

        return advance

    several, most = hops >= 2, ring.routes[0].hops if direction == FORTH else 0
    carry = _repeat(jnp.minimum(hops, 2), step(passes_on=True, gathers=False), carry, first, planned=min(most, 2))
    carry = _repeat(hops, step(passes_on=True, gathers=True), carry, 2, planned=max(most - 2, 0))
    last, only = (step(passes_on=False, gathers=gathers) for gathers in (True, False))
    carry = _repeat(jnp.where(several, hops + 1, 0), last, carry, hops, planned=most >= 2)
    carry = _repeat(jnp.where(several, 0, hops + 1), only, carry, jnp.maximum(hops, first), planned=most == 1)
    dq, _, earlier, gathered = carry
    return dq, earlier, gathered


def _sent_home(ring: RingPass, tree, hops, direction: int):
    """What travelled so many hops sent where it came from: on, if one more comes full circle, else back.

    Back by powers of two, since a transfer has a fixed length.
    """
    P, most = ring.context.layout.ring_size, ring.routes[0].hops if direction == FORTH else 0
    circle = hops == P - 1
    tree = _repeat(circle.astype(jnp.int32), lambda _, tree: ring.send(tree, direction), tree, planned=most == P - 1)
    for power in range((P - 1).bit_length()):
        far, turns = -direction * 2**power, jnp.where(circle, 0, (hops >> power) & 1)
        planned = (most >> power) & (most < P - 1)
        tree = _repeat(turns, lambda _, tree, far=far: ring.send(tree, far), tree, planned=planned)
    return tree


def _repeat(stop, step, carry, start: int | jax.Array = 0, *, planned: int):
    """`step(number, carry)` for the numbers from `start` up to `stop`, of which neither need be known."""
    start, stop = (jnp.asarray(x, jnp.int32) for x in (start, stop))
    with _planned(planned):
        return lax.fori_loop(start, stop, step, carry)


def _planned(turns: int):
    """Name a loop by how often it turns if one document fills the row, for who reads the compiled program."""
    return jax.named_scope(f"planned_{int(turns)}")
