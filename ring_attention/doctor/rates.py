"""TFLOP/s of the hops of one device of a ring, and of a single call of the same kernel over as many pairs."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ring_attention.attention.blockwise import blockwise_attention
from ring_attention.attention.device_kind import kind_here
from ring_attention.attention.kernels import KERNELS
from ring_attention.attention.kernels.tile_sizes import tiles_of
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.doctor.single_rank import SingleRank
from ring_attention.doctor.timing import System, rounds_within, seconds_in_turn
from ring_attention.parallel.layouts import SequenceLayout

PRODUCTS = {"forward": 2, "backward": 5}
PRODUCTS_IN_A_ROW = 8
LARGEST_ERROR = 0.02
"""Relative, between what the hops and what XLA's tiles give, above which they compute something else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes: `shard` tokens of one of `devices`, and which of them."""

    shard: int
    devices: int
    place: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that each device of a zigzag ring sees, for one head, its own diagonal too."""
        return self.shard * self.devices * self.shard // 2

    def array(self, seed: int, tokens: int, heads: int, *more: int):
        """Random numbers [..., 1, heads, tokens, D]."""
        shape = (*more, 1, heads, tokens, self.head_dim)
        return jax.random.normal(jax.random.key(seed), shape, self.dtype)


def hops_of(case: Case, impl: str, compare: bool = True) -> dict[str, System]:
    """Return the hops of one device, "forward" and "backward"; unless told otherwise compare them with XLA's tiles."""
    P, mask = case.devices, MaskSpec(scale=case.head_dim**-0.5)
    tiles = tiles_of(impl, kind_here(), case.head_dim, case.heads // case.kv_heads)
    device = SingleRank(kernel=KERNELS[impl], layout=SequenceLayout("zigzag", P), blocks=tiles)
    q, dout = (case.array(seed, case.shard, case.heads) for seed in (0, 1))
    k, v = (case.array(seed, case.shard, case.kv_heads, P) for seed in (2, 3))
    place = jnp.int32(case.place)
    forward = jax.jit(functools.partial(device.forward, segments=None, mask=mask))
    backward = jax.jit(lambda *args: device.backward(*args[:4], None, mask, *args[4:]))
    out, lse = forward(place, q, k, v)
    if compare and impl != "xla":
        other = SingleRank(kernel=KERNELS["xla"], layout=device.layout)
        want, _ = jax.jit(functools.partial(other.forward, segments=None, mask=mask))(place, q, k, v)
        _require_alike(impl, "out", out, want)
        wants = jax.jit(lambda *args: other.backward(*args[:4], None, mask, *args[4:]))(place, q, k, v, out, lse, dout)
        got = backward(place, q, k, v, out, lse, dout)
        jax.tree.map(functools.partial(_require_alike, impl, "a gradient"), got, wants)
    name = f"{P} hops"
    return {
        "forward": System(name, lambda: jax.block_until_ready(forward(place, q, k, v))),
        "backward": System(name, lambda: jax.block_until_ready(backward(place, q, k, v, out, lse, dout))),
    }


def _require_alike(impl: str, name: str, got, want) -> None:
    error = float(jnp.linalg.norm((got - want).astype("float32")) / jnp.linalg.norm(want.astype("float32")))
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"the hops of {impl} and of xla differ in {name} by {error:.1e}, relatively")


def one_call_of(case: Case, impl: str) -> dict[str, System]:
    """A single call over as many pairs: all queries of the device see half of all keys."""
    attend = functools.partial(blockwise_attention, causal=False, impl=impl)
    if impl == "cudnn":
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    heads = {0: case.heads, 1: case.heads, 2: case.kv_heads, 3: case.kv_heads}
    keys = case.devices * case.shard // 2
    q, dout, k, v = (
        case.array(seed, case.shard if seed < 2 else keys, number).swapaxes(1, 2) for seed, number in heads.items()
    )
    forward, backward = jax.jit(attend), jax.jit(lambda vjp, dout: vjp(dout))
    vjp = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1])(q, k, v)
    return {
        "forward": System("one call", lambda: jax.block_until_ready(forward(q, k, v))),
        "backward": System("one call", lambda: jax.block_until_ready(backward(vjp, dout))),
    }


def measure(
    case: Case,
    impl: str,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
    seconds: float = math.inf,
    compare: bool = True,
) -> dict[str, dict[str, float]]:
    """Pass -> {"hops": TFLOP/s, "one call": TFLOP/s, "ratio"}, from at most so many repeats of at most so many seconds.

    Raises:
      RuntimeError: with `compare`, if the hops give something else than those of XLA's tiles.
    """
    hops, one_call, found = hops_of(case, impl, compare), one_call_of(case, impl), {}
    for name, products in PRODUCTS.items():
        systems = [hops[name], one_call[name]]
        rounds = rounds_within(systems, repeats, seconds)
        taken = seconds_in_turn(systems, rounds, progress=progress)
        flops = 2 * products * case.pairs * case.heads * case.head_dim
        mine, single = (flops / taken[system.name] / 1e12 for system in systems)
        found[name] = {"hops": mine, "one call": single, "ratio": mine / single}
    return found


def matmul_rate(tokens: int, model_dim: int, ffn_dim: int, dtype: str, repeats: int) -> float:
    """FLOP/s of dense layers: products [tokens,M] x [M,F] and back, one after the other."""
    x, up, down = (
        jax.random.normal(jax.random.key(seed), shape, dtype) * shape[0] ** -0.5
        for seed, shape in enumerate([(tokens, model_dim), (model_dim, ffn_dim), (ffn_dim, model_dim)])
    )
    run = jax.jit(lambda x: jax.lax.fori_loop(0, PRODUCTS_IN_A_ROW, lambda _, x: (x @ up) @ down, x))
    system = System("products", lambda: jax.block_until_ready(run(x)))
    seconds = seconds_in_turn([system], rounds_within([system], repeats, 5.0))["products"]
    return 4 * PRODUCTS_IN_A_ROW * tokens * model_dim * ffn_dim / seconds
