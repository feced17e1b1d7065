"""The order in which a ring gives its queries to a kernel that would have the later chunk of a zigzag shard first.

What a remote hop of a causal zigzag ring shows is then a corner of its scores: all queries and the first half of the
keys, or the later half of the queries, which stand first, and all keys. A kernel that is told two lengths as it runs
computes both in one call, without a branch and without cutting its arrays.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_attention.attention.kernels.contract import Kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import Runs, Tokens
from ring_attention.parallel.layouts import SequenceLayout


class QueryOrder(NamedTuple):
    """The `half` last queries of a shard first, then as many others; 0 leaves them as they are."""

    half: int = 0

    @staticmethod
    def of(kernel: Kernel, layout: SequenceLayout, length: int, mask: MaskSpec, has_segments: bool) -> "QueryOrder":
        """The order for shards of `length` tokens, in which all the keys of a shard come in one hop."""
        corners = mask.causal and mask.window is None and not has_segments
        applies = kernel.later_first and layout.kind == "zigzag" and layout.ring_size > 1 and length % 2 == 0
        return QueryOrder(length // 2 if applies and corners else 0)

    def arrange(self, tree, axis: int = 2):
        """Arrays [B,H,t,...] in this order; done twice it is undone."""
        return jax.tree.map(lambda x: self._swap(x, axis), tree)

    def tokens(self, tokens: Tokens) -> Tokens:
        """What is known of the queries, in this order."""
        if not self.half:
            return tokens
        runs = tokens.runs
        if runs is not None:
            runs = Runs(runs.lengths[::-1], runs.step, tuple(starts[::-1] for starts in runs.starts))
        return dataclasses.replace(tokens, positions=self._swap(tokens.positions, 1), runs=runs)

    def _swap(self, x, axis: int):
        if not self.half:
            return x
        before, after = jnp.split(x, [self.half], axis)
        return jnp.concatenate([after, before], axis)
