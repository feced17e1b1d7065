"""All-gather attention: every device gets all keys and values and attends with its own queries.

Dubey et al. 2024, "The Llama 3 Herd of Models", section 3.3.2. Gathered at once this is the naive broadcast. Here it
goes a few key/value heads at a time, the next ones on their way while these are used, so that memory is bounded by
those few.
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
from ring_attention.parallel.strategy import Context, ShardTokens, Strategy
from ring_attention.parallel.workload import GATHER, Schedule, Step, Workload

HEADS, TOKENS = 1, 2
"""Axes of arrays [B,K,t,D]."""


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

    def forward(self, context: Context, me, q, k, v, tokens: ShardTokens) -> SoftmaxState:
        """The softmax state of this device's queries over all keys, a part of the heads at a time."""
        groups = self._groups(k.shape[HEADS])
        keys, parts = _keys(context, tokens.keys, k.shape[TOKENS]), _split(groups, k, v)

        def work(group, kv, q):
            state, pair = SoftmaxState.before(q, v), _pair(context, me, tokens, keys, group, q)
            return context.kernel.forward(q, *_in_order(context, kv), pair, state, context.blocks)

        def step(ready, group_and_q):
            group, q = group_and_q
            ahead = self._gather(context, parts, group + 1)
            return ahead, work(group, ready, q)

        (q,), ready, last = _split(groups, q), self._gather(context, parts, 0), groups - 1
        if last == 0:
            return SoftmaxState(*map(_join, [x[None] for x in work(0, ready, q[0])]))
        ready, results = lax.scan(step, ready, (jnp.arange(last, dtype=jnp.int32), q[:-1]))
        ends = work(last, ready, q[last])
        return SoftmaxState(*(_join(_append(x, end)) for x, end in zip(results, ends, strict=True)))

    def backward(self, context: Context, me, q, k, v, tokens: ShardTokens, stats: GlobalStats):
        """Gradients. Each device finds those of all keys by its queries; they are summed on the way to their owners.

        While a part of the heads is computed, the next one arrives and the gradients of the one before are on their
        way.
        """
        groups = self._groups(k.shape[HEADS])
        keys, parts, last = _keys(context, tokens.keys, k.shape[TOKENS]), _split(groups, k, v), groups - 1
        of_queries = _split(groups, q, *stats)

        def work(group, kv, of_queries):
            q, *stats = of_queries
            pair = _pair(context, me, tokens, keys, group, q)
            nothing = vary_over(jnp.zeros(q.shape, jnp.float32), axes_of(q))
            kv = _in_order(context, kv)
            dq, *dkv = context.kernel.backward(q, *kv, GlobalStats(*stats), pair, nothing, context.blocks)
            return dq, _in_order(context, dkv, back=True)

        def step(carry, group_and_queries):
            (ready, leaving), (group, of_queries) = carry, group_and_queries
            ahead, summed = self._gather(context, parts, group + 1), self._scatter(context, leaving)
            dq, dkv = work(group, ready, of_queries)
            return (ahead, dkv), (dq, summed)

        def of(group):
            return [x[group] for x in of_queries]

        ready = self._gather(context, parts, 0)
        if last == 0:
            dq, dkv = work(0, ready, of(0))
            return (dq, *self._scatter(context, dkv))
        ahead = self._gather(context, parts, 1)
        first_dq, dkv = work(0, ready, of(0))
        between = (jnp.arange(1, last, dtype=jnp.int32), [x[1:last] for x in of_queries])
        (ready, leaving), (dq, summed) = lax.scan(step, (ahead, dkv), between)
        before_last = self._scatter(context, leaving)
        last_dq, dkv = work(last, ready, of(last))
        dq = _append(jnp.concatenate([first_dq[None], dq]), last_dq)
        ends = zip(summed, before_last, self._scatter(context, dkv), strict=True)
        return tuple(_join(x) for x in (dq, *(_append(x, y, z) for x, y, z in ends)))

    def _gather(self, context: Context, parts, group):
        """K and V of all tokens, for the heads of a group."""
        return [lax.all_gather(x[group], context.axis_name, axis=TOKENS, tiled=True) for x in parts]

    def _scatter(self, context: Context, grads):
        """The sums over devices of gradients of all tokens, each device's own tokens."""
        return [lax.psum_scatter(x, context.axis_name, scatter_dimension=TOKENS, tiled=True) for x in grads]

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


def _in_order(context: Context, arrays, back: bool = False):
    """Arrays [B,K,T,D] of all tokens, gathered shard by shard, in the order in which kernels compute them, or back."""
    return [context.layout.in_order(x, TOKENS, back=back) for x in arrays]


def _keys(context: Context, keys: Tokens, shard_len: int) -> Tokens:
    """All keys' tokens, in the order in which kernels compute them."""
    layout = context.layout
    keys = jax.tree.map(lambda x: layout.in_order(lax.all_gather(x, context.axis_name, axis=1, tiled=True), 1), keys)
    positions = keys.positions
    if positions is None:
        positions = layout.in_order(layout.all_positions(shard_len).reshape(1, -1), 1)
    return dataclasses.replace(keys, positions=positions, runs=layout.all_runs(shard_len))


def _pair(context: Context, me, tokens: ShardTokens, keys: Tokens, group, q) -> BlockPair:
    """The pair of this device's queries of a group of heads and all keys."""
    heads, queries = q.shape[HEADS], context.placed(tokens.queries, me, q.shape[TOKENS])
    return BlockPair(queries, keys, tokens.mask.of_heads(group * heads, heads))


def _split(groups: int, *arrays):
    """Arrays [B,H,...] as [groups,B,H/groups,...]."""
    return [jnp.moveaxis(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 1, 0) for x in arrays]


def _join(x):
    """An array [groups,B,H/groups,...] as [B,H,...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _append(x, *ends):
    return jnp.concatenate([x, *(end[None] for end in ends)])
