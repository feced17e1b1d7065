"""Ring attention: key/value blocks travel around a ring of devices while each attends to the block it holds.

Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context".
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Tokens
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.checks import require
from ring_attention.parallel import counted_ring
from ring_attention.parallel.hops import count_hops
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.ring_pass import RingPass
from ring_attention.parallel.ring_schedule import counted_schedule, fixed_schedule
from ring_attention.parallel.routes import Route, plan_routes, token_hops
from ring_attention.parallel.strategy import Context, ShardTokens, Strategy
from ring_attention.parallel.workload import BOTH_WAYS, HOP, Schedule, Step, Workload


def check_pairs(context: Context, mask: MaskSpec, shard_len: int, *, duplex: bool = False) -> None:
    """Raise ValueError unless the kernel can compute every block pair of such a ring."""
    routes = plan_routes(context.layout, shard_len, causal=mask.causal, window=mask.reach, duplex=duplex)
    shard = Tokens(None, runs=context.layout.runs(shard_len))
    context.kernel.check_pair(BlockPair(shard, shard, mask, diagonal=True))
    for start, stop in {(route.start, route.stop) for route in routes if route.hops}:
        part = Tokens(None, runs=context.layout.runs(shard_len, start, stop))
        context.kernel.check_pair(BlockPair(shard, part, mask, diagonal=False))


def _with_part(route: Route, whole, part):
    """An array [B,K,t,D] of a shard's tokens, with what came back for those of a route added.

    Not by `at`: of all tokens it passes an empty index, at which jaxlib 0.11.2 ends in a segmentation fault.
    """
    here = lax.slice_in_dim(whole, route.start, route.stop, axis=2)
    return lax.dynamic_update_slice_in_dim(whole, here + part, route.start, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(Strategy):
    """Keys and values go around the ring, queries stay.

    Attributes:
      duplex: send the second half of each shard the other way round, for links that carry both directions at once.
      unroll: write the steps of the ring out instead of looping over them (docs/structure.md compares the programs).
    """

    name = "ring"
    counts_hops = True
    source = "Liu, Zaharia & Abbeel 2023"
    memory = "4 n/P d_kv, the blocks at hand and on their way, and n/P d of statistics in float32"
    communication = "2 n d_kv (P-1)/P, beside the computation; with a window only as far as it reaches"
    claim = ("O(n/P)", "O(n d), pipelined")

    duplex: bool = False
    unroll: bool = False

    def check(self, context: Context, q_shape, kv_heads: int, mask: MaskSpec) -> None:
        """The kernel must be able to compute every block pair."""
        check_pairs(context, mask, q_shape[1], duplex=self.duplex)

    def prepared(self, context: Context, tokens: ShardTokens, shard_len: int) -> ShardTokens:
        """The tokens with the number of hops, where arrays may tell that keys need not travel as far as they could."""
        routes = self._plan(context, tokens.mask, shard_len)
        known = not context.count_hops or not jax.tree.leaves((tokens.queries, tokens.keys))
        if known or self._fixed(context.layout.kind, routes, shard_len):
            return tokens
        return dataclasses.replace(tokens, hops=count_hops(context, tokens, shard_len))

    def _fixed(self, kind: str, routes: tuple[Route, ...], shard_len: int) -> bool:
        """Whether hops are known as a program is traced: a document's stripes lie everywhere, a window bounds parts."""
        whole = [(route.start, route.stop) for route in routes] == [(0, shard_len)]
        return self.duplex or self.unroll or kind == "striped" or not whole

    def _counted(self, work: Workload) -> Workload | None:
        """The work of a ring that counts its hops, which are those of one document where nobody says; else None."""
        if work.hops is not None:
            return work
        routes = self._routes(work)
        fixed = not (work.segments and work.count_hops) or self._fixed(work.layout, routes, work.shard)
        return None if fixed else dataclasses.replace(work, hops=(routes[0].hops, 0))

    def forward(self, context: Context, me, q, k, v, tokens: ShardTokens) -> SoftmaxState:
        """The softmax state of this device's queries over all keys that they see, as the blocks come by."""
        ring = self._ring_pass(context, me, k, tokens)
        if tokens.hops is not None:
            return counted_ring.forward(ring, q, k, v, tokens.hops)

        def take(state, block, pair: BlockPair):
            return context.kernel.forward(q, *block[:2], pair, state, context.blocks)

        def advance(carry, step, active, going_on):
            state, blocks = carry
            following = {i: ring.pass_on(i, blocks[i]) for i in going_on}
            state, following = ring.after(state, following)
            for i in active:
                state = take(state, blocks[i], ring.remote_pair(i, blocks[i][2], step))
            return state, following

        arriving = {i: ring.pass_on(i, ring.part(i, k, v)) for i in range(len(ring.routes))}
        pair = ring.local_pair(0, ring.length)
        state, arriving = ring.after(SoftmaxState.before(q, v), arriving)
        state = take(state, (k, v), pair)
        state, _ = ring.run(advance, (state, arriving), first=1)
        return state

    def backward(self, context: Context, me, q, k, v, tokens: ShardTokens, stats: GlobalStats):
        """Gradients. dK and dV of a block follow it around the ring, each hop's part added, and are then sent back.

        While a hop is computed, what the hop before gave is on its way. The local keys are computed while nothing else
        could be: one half while the first block arrives, the other while the gradients of remote keys return. Left to
        itself a compiler may put them beside a transfer that has a hop already, so what follows is made to wait.
        """
        ring, kernel = self._ring_pass(context, me, k, tokens), context.kernel
        if tokens.hops is not None:
            return counted_ring.backward(ring, q, k, v, stats, tokens.hops)

        def gradients(dq, block, pair: BlockPair):
            dq, *dblock = kernel.backward(q, *block[:2], stats, pair, dq, context.blocks)
            return dq, dblock

        def local(dq, kv, start: int, stop: int):
            if start == stop:
                return dq, [x[:, :, :0].astype(jnp.float32) for x in kv]
            return gradients(dq, [x[:, :, start:stop] for x in kv], ring.local_pair(start, stop))

        def advance(carry, step, active, going_on):
            dq, blocks, dblocks, returned = carry
            following = {i: ring.pass_on(i, blocks[i]) for i in going_on}
            dq, following = ring.after(dq, following)
            arriving = {i: lax.optimization_barrier(ring.pass_on(i, dblocks[i])) for i in active if i in dblocks}
            gathered = {}
            for i in active:
                dq, here = gradients(dq, blocks[i], ring.remote_pair(i, blocks[i][2], step))
                gathered[i] = jax.tree.map(jnp.add, arriving[i], here) if i in arriving else here
            back = {i: ring.send_back(i, gathered[i]) for i in active if i not in going_on}
            return dq, following, {i: gathered[i] for i in going_on}, returned | back

        dq = vary_over(jnp.zeros(q.shape, jnp.float32), axes_of(q))
        if not ring.routes:
            dq, (dk, dv) = local(dq, (k, v), 0, ring.length)
            return dq, dk, dv
        cut = kernel.halve(ring.length, context.blocks)
        arriving = {i: ring.pass_on(i, ring.part(i, k, v)) for i in range(len(ring.routes))}
        dq, arriving = ring.after(dq, arriving)
        dq, later = local(dq, (k, v), cut, ring.length)  # in most layouts the half that fewer queries see
        dq, later, arriving = lax.optimization_barrier((dq, later, arriving))
        carry = (dq, arriving, {}, {})  # nothing has been gathered yet that could be on its way
        carry = advance(carry, 1, range(len(ring.routes)), ring.longer_routes)
        dq, _, _, returned = ring.run(advance, carry, first=2)
        dq, kv = lax.optimization_barrier((dq, (k, v)))
        dq, returned = ring.after(dq, returned)
        dq, earlier = local(dq, kv, 0, cut)
        dk, dv = (jnp.concatenate(halves, 2) for halves in zip(earlier, later, strict=True))
        for i, parts in returned.items():
            dk, dv = (_with_part(ring.routes[i], x, part) for x, part in zip((dk, dv), parts, strict=True))
        return dq, dk, dv

    def _ring_pass(self, context: Context, me, k, tokens: ShardTokens) -> RingPass:
        length = k.shape[2]
        routes = self._plan(context, tokens.mask, length)
        return RingPass(context=context, me=me, tokens=tokens, length=length, routes=routes, unroll=self.unroll)

    def _plan(self, context: Context, mask: MaskSpec, shard_len: int) -> tuple[Route, ...]:
        return plan_routes(context.layout, shard_len, causal=mask.causal, window=mask.reach, duplex=self.duplex)

    def memory_bytes(self, work: Workload) -> int:
        """What travels of K and V, twice where it goes on, and the statistics of the queries in float32."""
        tokens = sum((route.stop - route.start) * min(route.hops, 2) for route in self._routes(work))
        return 2 * work.bytes_of(tokens, work.kv_heads) + work.bytes_of(work.shard, work.heads, 4)

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """K and V along each route; backward the same again, and dK and dV in float32 as often."""
        if counted := self._counted(work):
            return round(sum(step.keys + step.gradients for step in counted_schedule(counted, backward).steps))
        hops = token_hops(self._routes(work))
        sent = 2 * work.bytes_of(hops, work.kv_heads) + work.segment_bytes(hops)
        return sent + 2 * work.bytes_of(hops, work.kv_heads, 4) * backward

    def schedule(self, work: Workload, backward: bool = False) -> Schedule:
        """Own keys first, then those of one place more at each hop, each block sent on before it is computed with."""
        if counted := self._counted(work):
            return counted_schedule(counted, backward)
        return fixed_schedule(work, self._routes(work), BOTH_WAYS if self.duplex else HOP, backward)

    def variants(self, work: Workload, both_ways: bool) -> list[Strategy]:
        """One way round, and both ways where the links gain by it."""
        return [self, dataclasses.replace(self, duplex=True)] if both_ways else [self]

    def _routes(self, work: Workload) -> tuple[Route, ...]:
        layout = SequenceLayout(work.layout, work.devices)
        return plan_routes(layout, work.shard, causal=work.causal, window=work.window, duplex=self.duplex)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindow(Ring):
    """Each device gets the last tokens of the one before it, as far as the window reaches, and no more."""

    name = "sliding_window"
    source = "Beltagy, Peters & Cohan 2020; neighbour exchange as in ring attention with a window"
    full = False
    memory = "2 min(W, n/P) d_kv, and n/P d of statistics in float32"
    communication = "2 W d_kv, whatever n is; in the zigzag layout, both ways, twice that"
    claim = ("O(W)", "O(n W)")

    def check(self, context: Context, q_shape, kv_heads: int, mask: MaskSpec) -> None:
        """Refuse to be what it is not."""
        require(
            mask.window is not None,
            'strategy="sliding_window" got no window; give window=, or choose strategy="ring" for full attention',
        )
        require(
            mask.reach is not None,
            'strategy="sliding_window" needs a bound on how far a token sees, which causal intervals and a window that '
            'is open on one side have not; choose strategy="ring"',
        )
        require(
            context.devices == 1 or context.layout.kind != "striped",
            'strategy="sliding_window" needs neighbours in the sequence to be neighbours in the ring, but '
            'layout="striped" deals them to all devices; use "contiguous" or "zigzag", or strategy="ring"',
        )
        super().check(context, q_shape, kv_heads, mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleDevice(Strategy):
    """Blockwise attention on one device that holds everything."""

    name = "single_device"
    source = "Rabe & Staats 2021; Dao et al. 2022"
    memory = "n d of statistics in float32"
    communication = "none"
    claim = ("O(n)", "none")

    def check(self, context: Context, q_shape, kv_heads: int, mask: MaskSpec) -> None:
        """Refuse more devices than one."""
        require(
            context.devices == 1,
            f"strategy={self.name!r} needs the whole sequence on one device, but {context.axis_name!r} has "
            f"{context.devices}; make the mesh with {context.axis_name}=1 or choose another strategy",
        )
        check_pairs(context, mask, q_shape[1])

    def attend(self, context: Context, *arrays) -> tuple[jax.Array, jax.Array]:
        """A ring of one."""
        return Ring().attend(context, *arrays)

    def memory_bytes(self, work: Workload) -> int:
        """The statistics of the queries in float32."""
        return work.bytes_of(work.seq_len, work.heads, 4)

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """None."""
        return 0

    def schedule(self, work: Workload, backward: bool = False) -> Schedule | None:
        """All at once, on one device."""
        return Schedule(work=work, steps=(Step(range(1)),), backward=backward) if work.devices == 1 else None
