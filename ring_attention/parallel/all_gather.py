"""All-gather attention: every device gets all keys and values and attends with its own queries.

Dubey et al. 2024, "The Llama 3 Herd of Models", section 3.3.2. Gathered at once this is the naive broadcast. Here it
goes a few key/value heads at a time, the next ones on their way while these are used, so that memory is bounded by
those few.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels.contract import GlobalStats, Kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Tokens
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.checks import require
from ring_attention.parallel.exchange import attend
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.strategy import Context, Strategy
from ring_attention.parallel.workload import GATHER, Schedule, Step, Workload

TOKENS = 2
"""Axis of tokens in arrays [B,K,t,D]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathering:
    """An exchange (see `exchange`) in which every device gets the keys of all, `groups` times a part of the heads."""

    axis_name: str
    layout: SequenceLayout
    groups: int
    kernel: Kernel
    blocks: BlockSizes

    def forward(self, me, q, k, v, segments, mask: MaskSpec) -> SoftmaxState:
        """Statistics of this device's queries over all keys that they see."""
        keys, parts = self._keys(segments, q.shape[TOKENS]), self._split(k, v)

        def work(group, kv, q):
            k, v = kv
            state = vary_over(SoftmaxState.empty(q.shape), axes_of(q))
            pair = self._pair(me, mask, keys, segments, group, q)
            return self.kernel.forward(q, k, v, pair, state, self.blocks)

        def step(ready, group_and_q):
            group, q = group_and_q
            ahead = self._gather(parts, group + 1)
            return ahead, work(group, ready, q)

        (q,), ready, last = self._split(q), self._gather(parts, 0), self.groups - 1
        if last == 0:
            return SoftmaxState(*map(self._join, [x[None] for x in work(0, ready, q[0])]))
        ready, results = lax.scan(step, ready, (jnp.arange(last, dtype=jnp.int32), q[:-1]))
        return SoftmaxState(
            *(self._join(self._append(x, y)) for x, y in zip(results, work(last, ready, q[last]), strict=True))
        )

    def backward(self, me, q, k, v, segments, mask: MaskSpec, stats: GlobalStats):
        """Gradients. Each device finds those of all keys by its queries; they are summed on the way to their owners.

        While a part of the heads is computed, the next one arrives and the gradients of the one before are on their
        way.
        """
        keys, parts, last = self._keys(segments, q.shape[TOKENS]), self._split(k, v), self.groups - 1
        of_queries = self._split(q, *stats)

        def work(group, kv, of_queries):
            q, *stats = of_queries
            pair = self._pair(me, mask, keys, segments, group, q)
            nothing = vary_over(jnp.zeros(q.shape, jnp.float32), axes_of(q))
            dq, *dkv = self.kernel.backward(q, *kv, GlobalStats(*stats), pair, nothing, self.blocks)
            return dq, dkv

        def step(carry, group_and_queries):
            (ready, leaving), (group, of_queries) = carry, group_and_queries
            ahead, home = self._gather(parts, group + 1), self._scatter(leaving)
            dq, dkv = work(group, ready, of_queries)
            return (ahead, dkv), (dq, home)

        def of(group):
            return [x[group] for x in of_queries]

        ready = self._gather(parts, 0)
        if last == 0:
            dq, dkv = work(0, ready, of(0))
            return (dq, *self._scatter(dkv))
        ahead = self._gather(parts, 1)
        first_dq, dkv = work(0, ready, of(0))
        between = (jnp.arange(1, last, dtype=jnp.int32), [x[1:last] for x in of_queries])
        (ready, leaving), (dq, home) = lax.scan(step, (ahead, dkv), between)
        before_last = self._scatter(leaving)
        last_dq, dkv = work(last, ready, of(last))
        dq = self._append(jnp.concatenate([first_dq[None], dq]), last_dq)
        ends = zip(home, before_last, self._scatter(dkv), strict=True)
        return tuple(self._join(x) for x in (dq, *(self._append(x, y, z) for x, y, z in ends)))

    def _gather(self, parts, group):
        """K and V of all tokens, for the heads of a group."""
        return [lax.all_gather(x[group], self.axis_name, axis=TOKENS, tiled=True) for x in parts]

    def _scatter(self, grads):
        """The sums over devices of gradients of all tokens, each device's own tokens."""
        return [lax.psum_scatter(x, self.axis_name, scatter_dimension=TOKENS, tiled=True) for x in grads]

    def _keys(self, segments, shard_len: int) -> Tokens:
        """Where all keys stand, in the order in which they are gathered."""
        if segments is not None:
            segments = lax.all_gather(segments, self.axis_name, axis=1, tiled=True)
        return Tokens(self.layout.all_positions(shard_len).reshape(1, -1), segments, self.layout.all_runs(shard_len))

    def _pair(self, me, mask: MaskSpec, keys: Tokens, segments, group, q) -> BlockPair:
        """The pair of this device's queries of a group of heads and all keys."""
        heads, shard_len = q.shape[1], q.shape[TOKENS]
        positions = self.layout.shard_positions(me, shard_len)[None]
        queries = Tokens(positions, segments, self.layout.runs(shard_len))
        return BlockPair(queries, keys, mask.of_heads(group * heads, heads))

    def _split(self, *arrays):
        """Arrays [B,H,...] as [groups,B,H/groups,...]."""
        split = lambda x: x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])  # noqa: E731
        return [jnp.moveaxis(split(x), 1, 0) for x in arrays]

    def _join(self, x):
        """The reverse."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def _append(self, x, *ends):
        return jnp.concatenate([x, *(end[None] for end in ends)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGather(Strategy):
    """Every device gets all keys and values.

    Attributes:
      head_groups: into how many parts the key/value heads are divided, of which two are in memory at once; one part for
        each head by default, 1 for the naive broadcast of everything.
    """

    name = "all_gather"
    source = "Dubey et al. 2024 (Llama 3)"
    memory = "4 n d_kv / K, all keys and values of two heads (2 n d_kv with head_groups=1), and n/P d of statistics"
    communication = "2 n d_kv (P-1)/P"
    claim = ("O(n)", "O(n P)")

    head_groups: int | None = None

    def _groups(self, kv_heads: int) -> int:
        return kv_heads if self.head_groups is None else self.head_groups

    def check(self, context: Context, q_shape, kv_heads: int, mask: MaskSpec) -> None:
        """The groups must be equal, and the kernel able to compute all keys at once."""
        groups = self._groups(kv_heads)
        require(
            groups >= 1 and kv_heads % groups == 0,
            f"head_groups={groups} must divide the {kv_heads} key/value heads of a device; leave it out for one head "
            "at a time",
        )
        queries, keys = context.layout.runs(q_shape[1]), context.layout.all_runs(q_shape[1])
        context.kernel.check_pair(BlockPair(Tokens(None, runs=queries), Tokens(None, runs=keys), mask))

    def attend(self, context: Context, q, k, v, segments, mask: MaskSpec, sinks):
        """See `Strategy`."""
        gathering = Gathering(
            axis_name=context.axis_name,
            layout=context.layout,
            groups=self._groups(k.shape[1]),
            kernel=context.kernel,
            blocks=context.blocks,
        )
        return attend(gathering, q, k, v, segments, mask, sinks)

    def memory_bytes(self, work: Workload) -> int:
        """All tokens of two parts of the heads (of one, where there is only one), and the statistics in float32."""
        groups = self._groups(work.kv_heads)
        gathered = 2 * work.bytes_of(work.seq_len, work.kv_heads) // groups
        return min(groups, 2) * gathered + work.bytes_of(work.shard, work.heads, 4)

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """Own K and V to each of the others; backward the same again, and their dK and dV to them in float32."""
        others = (work.devices - 1) * work.shard
        sent = 2 * work.bytes_of(others, work.kv_heads) + work.segment_bytes(others)
        return sent + 2 * work.bytes_of(others, work.kv_heads, 4) * backward

    def schedule(self, work: Workload, backward: bool = False) -> Schedule:
        """A part of the heads at a time, while the next one's keys arrive and the gradients of the one before leave."""
        groups, others = self._groups(work.kv_heads), (work.devices - 1) * work.shard
        keys = 2 * work.bytes_of(others, work.kv_heads) / groups
        gradients = 2 * work.bytes_of(others, work.kv_heads, 4) / groups * backward
        steps = [Step(keys=keys, way=GATHER)]
        for group in range(groups):
            ahead, leaving = keys * (group + 1 < groups), gradients * (group > 0)
            steps.append(Step(range(work.devices), 1 / groups, ahead, leaving, GATHER))
        return Schedule(work=work, steps=(*steps, Step(gradients=gradients, way=GATHER)), backward=backward)
