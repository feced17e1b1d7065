"""The TPU kernel in JAX's interpreter, as the kernel of a ring, against the oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import Bound, ring_mesh

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.attention.kernels import splash
from ring_attention.testing import NAMES, random_qkv, random_segments

B, H, K, D, P = 2, 4, 2, 64, 2
T = 2 * P * splash.LANES  # a chunk of a zigzag shard is a tile
BLOCKS = ra.BlockSizes(q=128, kv=128)
EVERYTHING = dict(
    window=200,
    segment_ids=random_segments(1, B, T),
    softcap=5.0,
    sinks=np.linspace(-1, 1, H, dtype=np.float32),
)
MASKS = {"causal": {}, "bidirectional": dict(causal=False), "everything": EVERYTHING}
"""The window's end falls within a tile, so that keys that travel are padded to whole tiles."""


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    forward, backward = (
        functools.partial(fn, interpret=True) for fn in (splash.SPLASH.forward, splash.SPLASH.backward)
    )
    kernel = splash.SPLASH._replace(name="interpreted", forward=forward, backward=backward, platform=None)
    monkeypatch.setitem(kernels.KERNELS, "interpreted", kernel)


def _results(qkv, layout, mask, strategy="ring"):
    """(out, dq, dk, dv) in natural order; JAX's interpreter does not know how values vary over a mesh."""
    layout, mask = ra.SequenceLayout(layout, P), dict(mask)
    segment_ids = mask.pop("segment_ids", None)

    def on_shard(q, k, v, dout, *segments):
        arguments = dict(layout=layout, impl="interpreted", block_sizes=BLOCKS, strategy=strategy) | mask
        arguments["segment_ids"] = segments[0] if segments else None
        out, vjp = jax.vjp(functools.partial(ra.context_attention_shard, **arguments), q, k, v)
        return out, *vjp(dout)

    spec = jax.P(None, "sp")
    run = jax.jit(jax.shard_map(on_shard, mesh=ring_mesh(P), in_specs=spec, out_specs=spec, check_vma=False))
    arrays = [*qkv] if segment_ids is None else [*qkv, jnp.asarray(segment_ids)]
    return [layout.unpermute(x, 1) for x in run(*(layout.permute(x, 1) for x in arrays))]


QUICK = [("zigzag", "causal", "bfloat16")]
ALL = [
    (layout, mask, dtype)
    for dtype in ("float32", "bfloat16")
    for layout in ("contiguous", "zigzag", "striped")
    for mask in MASKS
]


@pytest.mark.parametrize(
    ("layout", "mask", "dtype"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in ALL],
)
def test_splash_ring_is_as_exact_as_dense_attention(layout, mask, dtype):
    qkv = random_qkv(0, B, T, H, K, D, dtype=dtype)
    assert Bound(qkv, **MASKS[mask]).too_large(_results(qkv, layout, MASKS[mask])) == {}


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="dq is 2.06 times as far off as dense attention's: q is scaled in bfloat16")
def test_splash_rounds_q_where_the_scale_is_no_power_of_two():
    qkv = random_qkv(0, B, T, H, K, 32, dtype="bfloat16")
    assert Bound(qkv, causal=False).too_large(_results(qkv, "zigzag", dict(causal=False))) == {}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["all_gather", "ulysses"])
def test_splash_serves_other_strategies_too(strategy):
    qkv = random_qkv(0, B, T, H, K, D)
    assert Bound(qkv).too_large(_results(qkv, "zigzag", {}, strategy)) == {}


def test_splash_tiles_left_out_exceed_the_bound(monkeypatch):
    qkv = random_qkv(0, 1, T, 2, 1, D)
    seen = splash.tile_kinds

    def mutant(pair):
        kinds = seen(pair)
        return kinds.at[..., -1].set(splash.EMPTY)

    monkeypatch.setattr(splash, "tile_kinds", mutant)
    assert set(Bound(qkv).too_large(_results(qkv, "contiguous", {}))) == set(NAMES)


def _kernels(jaxpr):
    """Equations of a traced program that call kernels."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                yield from _kernels(inner) if hasattr(inner, "eqns") else ()


def test_splash_tells_the_compiler_what_each_kernel_costs():
    q = jax.ShapeDtypeStruct((1, T, H, D), "bfloat16")
    attend = functools.partial(ra.ring_attention, mesh=ring_mesh(P), layout="zigzag", impl="interpreted")
    traced = jax.make_jaxpr(lambda *qkv: jax.vjp(attend, *qkv)[1](qkv[0]))(q, q, q)
    costs = [eqn.params["cost_estimate"] for eqn in _kernels(traced)]
    t, chunk = T // P, T // P // 2
    forward, dq, dkv = (2 * products * D * H * t * chunk // 2 for products in (2, 3, 4))
    assert sorted(cost.flops for cost in costs) == sorted(4 * [forward] + 4 * [dq] + 4 * [dkv])


def test_splash_refuses_what_it_cannot_do():
    q = jnp.zeros((1, 512, 4, 16))
    mesh = ring_mesh(2)
    attend = functools.partial(ra.ring_attention, q, q, q, mesh=mesh)
    with pytest.raises(ValueError, match=re.escape("impl='splash' runs on tpu devices, but these are cpu; use impl=")):
        attend(impl="splash")
    with pytest.raises(ValueError, match='impl="splash" has no alibi_slopes; leave it out, or use impl="xla"'):
        attend(impl="interpreted", alibi_slopes=jnp.ones(4))
    with pytest.raises(ValueError, match='impl="splash" has no dropout_rate'):
        attend(impl="interpreted", dropout_rate=0.1, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match="works on tiles of 128 tokens, but a shard has 100; pad the sequence"):
        ra.ring_attention(q[:, :200], q[:, :200], q[:, :200], mesh=mesh, impl="interpreted")
    with pytest.raises(ValueError, match="needs to know how keys are spaced"):
        ra.context_attention(q, q, q, mesh=mesh, strategy="sparse", stride=16, impl="interpreted")


def test_splash_loads_for_each_tile_the_next_that_is_seen():
    seen = jnp.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
    assert splash._next_seen(seen, axis=1).tolist() == [[1, 1, 3, 3, 0], [0, 0, 0, 0, 0]]
    assert splash._next_seen(seen, axis=0).tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
