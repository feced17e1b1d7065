"""Ulysses attention: an all-to-all gives each device the whole sequence of some of the heads.

Jacobs et al. 2023, "DeepSpeed Ulysses". And USP (Fang & Zhao 2024): the same among a few neighbouring devices, which
then share a place in a ring; the all-to-all stays on the fast links inside a node, the ring crosses the slow ones.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.checks import require
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.ring import Ring, check_pairs
from ring_attention.parallel.routes import plan_routes, token_hops
from ring_attention.parallel.strategy import Context, ShardTokens, Strategy, closest_divisor
from ring_attention.parallel.workload import SWAP, Schedule, Step, Workload

HEADS, TOKENS = 1, 2
"""Axes of arrays [B,H,t,D]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swap:
    """Heads for tokens, among `size` consecutive devices.

    Attributes:
      axis_name: of all devices.
      groups: the devices that swap with each other; None: all of them.
      order: int [size * t], how to sort the tokens of such devices, side by side, into the order of the merged layout.
    """

    axis_name: str
    groups: list[list[int]] | None
    order: np.ndarray

    def heads_for_tokens(self, x_BHtD):
        """[B,H,t,...] to [B,H/size,size*t,...]."""
        return self._sort(self._all_to_all(x_BHtD, HEADS, TOKENS), TOKENS, self.order)

    def tokens_for_heads(self, x_BHtD):
        """The way back."""
        return self._all_to_all(self._sort(x_BHtD, TOKENS, np.argsort(self.order)), TOKENS, HEADS)

    def gather(self, x_Bt):
        """What is said of all tokens, [B,size*t].

        In groups they go as copies in an all-to-all, of as many bytes: libtpu 0.0.42 ends the process where an
        all-gather has groups of eight along the cycle of v5e:16x16 ("Failed to create limited ICI routing replica info
        table").
        """
        if self.groups is None:
            gathered = lax.all_gather(x_Bt, self.axis_name, axis=1, tiled=True)
        else:
            copies = jnp.repeat(x_Bt[:, None], len(self.groups[0]), axis=1)
            gathered = self._all_to_all(copies, 1, 2)[:, 0]
        return self._sort(gathered, 1, self.order)

    def _all_to_all(self, x, split_axis: int, concat_axis: int):
        return lax.all_to_all(x, self.axis_name, split_axis, concat_axis, tiled=True, axis_index_groups=self.groups)

    def _sort(self, x, axis: int, order: np.ndarray):
        if np.array_equal(order, np.arange(len(order))):
            return x
        return jnp.take(x, order.astype(np.int32), axis, unique_indices=True, mode="clip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usp(Strategy):
    """Ulysses among neighbours, a ring across.

    Attributes:
      ulysses_size: how many consecutive devices swap heads for tokens; a divisor of the devices, and of the query
        heads. The most that divide the key/value heads, too, by default. Where it does not divide those, they are
        repeated until it does.
    """

    name = "usp"
    source = "Fang & Zhao 2024"
    memory = "n/P (2 d + 2 d_kv), q, k, v and out once more, 4 n/P d_kv of blocks, and n/P d of statistics in float32"
    communication = "2 n/P (d + d_kv) (U-1)/U for the swaps, U = ulysses_size, and 2 n/U d_kv (P-U)/P for the ring"

    ulysses_size: int | None = None

    def size(self, devices: int, heads: int, kv_heads: int) -> int:
        """U."""
        return math.gcd(devices, heads, kv_heads) if self.ulysses_size is None else self.ulysses_size

    def check(self, context: Context, q_shape, kv_heads: int, mask: MaskSpec) -> None:
        """There must be heads enough to share out."""
        devices, heads = context.devices, q_shape[2]
        size = self.size(devices, heads, kv_heads)
        require(
            size >= 1 and devices % size == 0,
            f"ulysses_size={size} must divide the {devices} devices along {context.axis_name!r}; leave it out for the "
            f"most that the heads allow, {math.gcd(devices, heads, kv_heads)}",
        )
        require(
            heads % size == 0,
            f"strategy={self.name!r} shares {heads} query heads out among {size} devices, which do not divide them; "
            f'use strategy="usp" with ulysses_size={math.gcd(heads, devices)}, or strategy="ring"',
        )
        places = context.layout.merged(size)  # raises where it cannot be merged
        check_pairs(dataclasses.replace(context, layout=places, width=size), mask, size * q_shape[1])

    def attend(self, context: Context, q, k, v, tokens: ShardTokens, sinks):
        """Swap heads for tokens among neighbours, go around the ring of their places, and swap back."""
        (_, H, t, _), K, P = q.shape, k.shape[HEADS], context.devices
        U = self.size(P, H, K)
        swap = Swap(
            axis_name=context.axis_name,
            groups=None if U == P else np.arange(P).reshape(-1, U).tolist(),
            order=_order(context.layout, U, t),
        )
        first = lax.rem(lax.axis_index(context.axis_name), np.int32(U)) * (H // U)
        sinks = None if sinks is None else lax.dynamic_slice_in_dim(sinks, first, H // U)
        copies = kv_copies(K, U)
        k, v = (repeat_heads(x, copies) for x in (k, v))
        merged = dataclasses.replace(context, layout=context.layout.merged(U), width=U)
        keys = jax.tree.map(swap.gather, tokens.keys)
        queries = keys if tokens.queries is tokens.keys else jax.tree.map(swap.gather, tokens.queries)
        tokens = ShardTokens(queries=queries, keys=keys, mask=tokens.mask.of_heads(first, H // U))
        ring, tokens = Ring(), Ring().prepared(merged, tokens, U * k.shape[TOKENS])
        results = ring.attend(merged, *map(swap.heads_for_tokens, (q, k, v)), tokens, sinks)
        return tuple(map(swap.tokens_for_heads, results))

    def memory_bytes(self, work: Workload) -> int:
        """q, k, v and out of some heads and more tokens, the ring's blocks of them, and the statistics in float32."""
        U = self.size(work.devices, work.heads, work.kv_heads)
        kv_heads = work.kv_heads * kv_copies(work.kv_heads, U)
        swapped = 2 * work.bytes_of(work.shard, work.heads) + 2 * work.bytes_of(work.shard, kv_heads)
        blocks = 4 * work.bytes_of(work.shard, kv_heads) * (work.devices > U)
        return swapped + blocks + work.bytes_of(work.shard, work.heads, 4)

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """All but one part in U of q, k, v and out, backward of their gradients; and what the ring sends of k and v."""
        U = self.size(work.devices, work.heads, work.kv_heads)
        kv_heads = work.kv_heads * kv_copies(work.kv_heads, U)
        swapped = 2 * (work.bytes_of(work.shard, work.heads) + work.bytes_of(work.shard, kv_heads)) * (U - 1) // U
        layout = SequenceLayout(work.layout, work.devices).merged(U)
        routes = plan_routes(layout, U * work.shard, causal=work.causal, window=work.window, duplex=False)
        hops = token_hops(routes)
        ring = 2 * work.bytes_of(hops, kv_heads) // U + work.segment_bytes(hops)
        if backward:
            return swapped + ring + 2 * work.bytes_of(hops, kv_heads, 4) // U
        return swapped + ring + work.segment_bytes((U - 1) * work.shard)

    def schedule(self, work: Workload, backward: bool = False) -> Schedule:
        """A ring of the places, with more tokens and fewer heads, between two swaps that nothing hides."""
        U = self.size(work.devices, work.heads, work.kv_heads)
        kv_heads = work.kv_heads * kv_copies(work.kv_heads, U)
        queries, keys = (work.bytes_of(work.shard, heads) * (U - 1) / U for heads in (work.heads, kv_heads))
        before, after = (queries, queries + 2 * keys) if backward else (queries + 2 * keys, queries)
        places = dataclasses.replace(work, devices=work.devices // U, heads=work.heads // U, kv_heads=kv_heads // U)
        ring = Ring().schedule(places, backward)
        steps = (Step(keys=before, way=SWAP), *ring.steps, Step(keys=after, way=SWAP))
        return Schedule(work=places, steps=steps, backward=backward, width=U)

    def variants(self, work: Workload, both_ways: bool) -> list[Strategy]:
        """Every size for which both swaps and a ring are left to do."""
        sizes = range(2, work.devices)
        fits = [size for size in sizes if work.devices % size == work.heads % size == 0]
        return [dataclasses.replace(self, ulysses_size=size) for size in fits]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ulysses(Usp):
    """Every device gets the whole sequence of some heads."""

    name = "ulysses"
    source = "Jacobs et al. 2023 (DeepSpeed Ulysses)"
    memory = "n/P (2 d + 2 d_kv), q, k, v and out once more, and n/P d of statistics in float32"
    communication = "2 n/P (d + d_kv) (P-1)/P; more where P does not divide the key/value heads"

    ulysses_size: None = dataclasses.field(default=None, init=False)

    def size(self, devices: int, heads: int, kv_heads: int) -> int:
        """All devices."""
        return devices

    def variants(self, work: Workload, both_ways: bool) -> list[Strategy]:
        """Only this one."""
        return [self]


def even_size(devices: int) -> int:
    """The ulysses_size that divides the devices most evenly between Ulysses and the ring."""
    return closest_divisor(devices, math.sqrt(devices)) or 1


def kv_copies(kv_heads: int, size: int) -> int:
    """How often each key/value head must be repeated for `size` devices to share them out."""
    return size // math.gcd(kv_heads, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat_heads(x_BKtD, copies: int):
    """Each head `copies` times; their gradients are summed in float32."""
    return _repeated(x_BKtD, copies)


def _repeated(x_BKtD, copies: int):
    return jnp.repeat(x_BKtD, copies, HEADS)


def _repeat_forward(x, copies: int):
    return _repeated(x, copies), None  # not the decorated function, through which no tangent would go


def _repeat_backward(copies: int, _, grad):
    B, H, *rest = grad.shape
    return (grad.astype(jnp.float32).reshape(B, H // copies, copies, *rest).sum(2).astype(grad.dtype),)


repeat_heads.defvjp(_repeat_forward, _repeat_backward)


def _order(layout: SequenceLayout, size: int, shard_len: int) -> np.ndarray:
    """How to sort the tokens of `size` neighbours: the same for each such group, see `SequenceLayout.merged`."""
    if layout.kind == "given":
        return np.arange(size * shard_len)
    positions = layout.positions(layout.ring_size * shard_len)[: size * shard_len]
    wanted = layout.merged(size).positions(layout.ring_size * shard_len)[: size * shard_len]
    order = np.argsort(positions)
    return order[np.searchsorted(positions[order], wanted)]
