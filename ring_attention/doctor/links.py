"""Hops of a ring on its wires: bandwidth and latency each way round, and how much of a transfer a hop hides."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from ring_attention.doctor.rates import Case
from ring_attention.doctor.timing import System, rounds_within, seconds_in_turn
from ring_attention.parallel.context import context_attention
from ring_attention.parallel.mesh import SEQUENCE, compiler_options
from ring_attention.parallel.ring import Ring
from ring_attention.parallel.ring_pass import RingPass

WAYS = {"along": 1, "against": -1}
HOPS = 16
"""Transfers one after the other in a program, so that its start costs little beside them."""


class _StillPass(RingPass):
    def send(self, tree, shift: int):
        """Keep what would be sent."""
        return tree


class _StillRing(Ring):
    """A ring that computes as many block pairs and sends nothing; its results are no attention."""

    def _ring_pass(self, *args) -> RingPass:
        return _StillPass(**vars(super()._ring_pass(*args)))


def transfers(mesh: Mesh, shift: int, hops: int) -> Callable:
    """A compiled function that passes arrays, cut along their first axis, so many times `shift` places further."""
    size, spec = mesh.shape[SEQUENCE], jax.P(SEQUENCE)
    pairs = [(i, (i + shift) % size) for i in range(size)]

    def on_device(tree):
        for _ in range(hops):  # a loop would copy what it carries
            tree = jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, pairs), tree)
        return tree

    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(sharded, compiler_options=compiler_options(mesh))


def measure_links(mesh: Mesh, sizes: Sequence[int], repeats: int) -> dict[str, dict]:
    """Way -> bandwidth in bytes a second, latency in seconds, and each size (multiples of 1,024) with its time."""
    sharding, systems = NamedSharding(mesh, jax.P(SEQUENCE)), []
    arrays = [jnp.zeros((mesh.size * size // 1024, 256), jnp.float32, device=sharding) for size in sizes]
    for way, shift in WAYS.items():
        send = transfers(mesh, shift, HOPS)
        for size, x in zip(sizes, arrays, strict=True):
            systems.append(System(f"{way} {size}", lambda send=send, x=x: jax.block_until_ready(send(x))))
    seconds = seconds_in_turn(systems, rounds_within(systems, repeats, 20.0))
    found = {}
    for way in WAYS:
        hops = [seconds[f"{way} {size}"] / HOPS for size in sizes]
        latency, bandwidth = fit(sizes, hops)
        rows = [{"bytes": size, "seconds": hop} for size, hop in zip(sizes, hops, strict=True)]
        found[way] = {"bandwidth": bandwidth, "latency": latency, "hops": rows}
    return found


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(latency in seconds, bandwidth in bytes a second) of latency + bytes / bandwidth, the least relative errors.

    Where that gives a latency below 0 it is 0, and where larger sizes take no longer the bandwidth is the largest seen.
    """
    sizes, seconds = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    latency, slope = np.linalg.lstsq(np.stack([1 / seconds, sizes / seconds], 1), np.ones(len(sizes)), rcond=None)[0]
    if slope <= 0:
        return max(float(latency), 0.0), float((sizes / seconds).max())
    if latency < 0:
        slope = (sizes / seconds).sum() / ((sizes / seconds) ** 2).sum()
    return max(float(latency), 0.0), float(1 / slope)


def measure_overlap(mesh: Mesh, case: Case, impl: str, repeats: int) -> dict[str, float]:
    """Seconds of a ring forward, of the same without its transfers, of these alone; the share that is hidden."""
    sharding, tokens = NamedSharding(mesh, jax.P(None, SEQUENCE)), mesh.size * case.shard
    heads = (case.heads, case.kv_heads, case.kv_heads)
    draw = jax.jit(  # no device ever holds the whole sequence
        lambda: [case.array(seed, tokens, number).swapaxes(1, 2) for seed, number in enumerate(heads)],
        out_shardings=sharding,
    )
    q, k, v = draw()

    def ring(strategy: Ring) -> Callable[[], object]:
        attend = functools.partial(context_attention, mesh=mesh, layout="zigzag", impl=impl, strategy=strategy)
        run = jax.jit(attend, compiler_options=compiler_options(mesh))
        return lambda: jax.block_until_ready(run(q, k, v))

    shape, sharding = (mesh.size, case.shard, case.kv_heads, case.head_dim), NamedSharding(mesh, jax.P(SEQUENCE))
    blocks = [jnp.zeros(shape, case.dtype, device=sharding) for _ in range(2)]
    send = transfers(mesh, WAYS["along"], mesh.size - 1)
    systems = [
        System("ring", ring(Ring())),
        System("without transfers", ring(_StillRing())),
        System("transfers alone", lambda: jax.block_until_ready(send(blocks))),
    ]
    seconds = seconds_in_turn(systems, rounds_within(systems, repeats, 20.0))
    waits = seconds["ring"] - seconds["without transfers"]
    return seconds | {"hidden": min(max(1 - waits / seconds["transfers alone"], 0.0), 1.0)}
