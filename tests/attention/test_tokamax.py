"""Tokamax as the kernel of a ring: on a GPU itself, elsewhere its two kernels in plain JAX, against the oracle."""

import functools
import importlib.util
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_rings import B, D, H, K, T, each_padded, each_ring, each_strategy, too_large
from ring_helpers import Bound, results, ring_mesh

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.attention.kernels import tokamax, tokamax_calls, xla
from ring_attention.attention.kernels.cudnn_device import Gpu
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.parallel import context
from ring_attention.testing import random_qkv

DOCUMENT = np.where(np.arange(T) < 150, 1, 2)[None].repeat(B, 0)
OTHER_DOCUMENTS = np.where(np.arange(T) < np.array([[150], [70]]), 1, 2)
COMES_BACK = np.where(np.arange(T) // 20 % 2, 1, 2)[None].repeat(B, 0)
MASKS = {
    "causal": {},
    "bidirectional": dict(causal=False),
    "window": dict(window=100, softcap=3.0),
    "two-sided window": dict(window=50, causal=False),
    "documents": dict(segment_ids=OTHER_DOCUMENTS, sinks=np.linspace(-1, 1, H, dtype=np.float32)),
}
NEEDS_TOKAMAX = pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")


def _scores(q, k, first, last, setting):
    """float32 (scores [H,t,s], their derivative by what the cap takes) of q [t,H,D] and k [s,K,D]; -inf if hidden."""
    (t, H, _), s = q.shape, k.shape[0]
    k = jnp.repeat(k, H // k.shape[1], 1)
    scores, slope = setting.scale * jnp.einsum("thd,shd->hts", q, k, preferred_element_type=jnp.float32), 1.0
    if setting.softcap is not None:
        slope = 1 - jnp.tanh(scores / setting.softcap) ** 2
        scores = setting.softcap * jnp.tanh(scores / setting.softcap)
    i, j = jnp.arange(t)[:, None], jnp.arange(s)
    seen = i >= j if setting.causal else jnp.ones((t, s), bool)
    if first is not None:
        seen &= j >= first[0, :, None]
    if last is not None:
        seen &= j < last[0, :, None]
    return jnp.where(seen, scores, -jnp.inf), slope


def _attend(q, k, v, first, last, setting):
    scores, _ = _scores(q, k, first, last, setting)
    largest = scores.max(-1)
    weights = jnp.exp(scores - jnp.where(largest == -jnp.inf, 0, largest)[..., None])
    total = weights.sum(-1)
    weights /= jnp.where(total == 0, 1, total)[..., None]
    v = jnp.repeat(v, q.shape[1] // v.shape[1], 1)
    return jnp.einsum("hts,shd->thd", weights.astype(v.dtype), v), largest, total


def _differentiate(q, k, v, statistics, out, dout, first, last, setting):
    K, dtype, (largest, total) = k.shape[1], q.dtype, statistics
    scores, slope = _scores(q, k, first, last, setting)
    p = jnp.exp(scores - largest[..., None]) / total[..., None]
    q, k, v, out, dout = (x.astype(jnp.float32) for x in (q, k, v, out, dout))
    k, v = (jnp.repeat(x, q.shape[1] // K, 1) for x in (k, v))
    delta = jnp.einsum("thd,thd->ht", dout, out)
    ds = p * (jnp.einsum("thd,shd->hts", dout, v) - delta[..., None]) * slope * setting.scale
    dk, dv = (jnp.einsum("hts,thd->shd", x, y) for x, y in ((ds, q), (p, dout)))
    dk, dv = (x.reshape(x.shape[0], K, -1, x.shape[-1]).sum(2).astype(dtype) for x in (dk, dv))
    return jnp.einsum("hts,shd->thd", ds, k).astype(dtype), dk, dv


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """Where there is no GPU, what the kernels are documented to do; causal tiles are cut as large ones are."""
    context._sharded.cache_clear()  # it does not know that a kernel was replaced
    monkeypatch.setattr(tokamax, "SMALLEST_CUT", 16)
    if jax.default_backend() == "gpu":
        return
    monkeypatch.setattr(tokamax, "_attend", _attend)
    monkeypatch.setattr(tokamax, "_differentiate", _differentiate)
    monkeypatch.setattr(tokamax, "_require_bindings", lambda generation: None)
    monkeypatch.setitem(kernels.KERNELS, "tokamax", tokamax.TOKAMAX._replace(platform=None))


@each_ring(MASKS)
def test_tokamax_ring_is_as_exact_as_dense_attention(layout, mask):
    assert too_large("tokamax", layout, MASKS[mask]) == {}


@pytest.mark.slow
@each_strategy
def test_tokamax_serves_other_strategies_too(strategy):
    assert too_large("tokamax", "zigzag", {}, kv_heads=4, dtype="float16", strategy=strategy) == {}


@pytest.mark.slow
@each_padded
def test_tokamax_pads_lengths_that_do_not_divide(arguments):
    assert too_large("tokamax", "zigzag", arguments, tokens=T - 19, rows=1) == {}


def _tiles_taken(monkeypatch):
    """Numbers of tiles, forward, that the kernel and that XLA computed as the program ran."""
    taken = {"tokamax": 0, "xla": 0}

    def counted(name, function):
        def wrapper(*args, **settings):
            jax.debug.callback(lambda: taken.__setitem__(name, taken[name] + 1))
            return function(*args, **settings)

        return wrapper

    monkeypatch.setattr(tokamax, "_attend", counted("tokamax", tokamax._attend))
    monkeypatch.setattr(xla, "forward", counted("xla", xla.forward))
    return taken


@pytest.mark.parametrize(
    ("mask", "taken"),
    [
        (dict(segment_ids=DOCUMENT), {"tokamax": B, "xla": 0}),
        (dict(segment_ids=COMES_BACK), {"tokamax": 0, "xla": 1}),
        (dict(intervals=ra.Intervals.chunks(np.arange(T), 50), kv_lengths=np.full(B, T - 9)), {"tokamax": B, "xla": 0}),
    ],
    ids=["once", "come back", "intervals"],
)
def test_xla_computes_tiles_whose_keys_do_not_follow_each_other(mask, taken, monkeypatch):
    if jax.default_backend() == "gpu":
        pytest.skip("it counts stand-ins")
    found = _tiles_taken(monkeypatch)
    qkv = random_qkv(0, B, T, H, K, D, dtype="bfloat16")
    attend = functools.partial(ra.blockwise_attention, impl="tokamax", **mask)
    assert Bound(qkv, **mask).too_large(results(attend, qkv)) == {}
    jax.effects_barrier()
    assert {name: number > 0 for name, number in found.items()} == {name: number > 0 for name, number in taken.items()}


def test_window_and_cap_are_one_call_without_a_branch():
    q = jax.ShapeDtypeStruct((1, T, H, D), "bfloat16")
    for arguments in (dict(window=33, softcap=3.0), dict(causal=False, window=33)):
        attend = functools.partial(ra.blockwise_attention, impl="tokamax", **arguments)
        assert "cond[" not in str(jax.make_jaxpr(attend)(q, q, q))


RANGES = tokamax._ranges
WRONG = {  # what is wrong: the mask of which it is seen, and what is put where
    "the range of the query before": (
        dict(segment_ids=DOCUMENT),
        dict(_ranges=lambda *tile: (jax.tree.map(lambda x: jnp.roll(x, 1, 1), RANGES(*tile)[0]), RANGES(*tile)[1])),
    ),
    "segments always follow each other": (
        dict(segment_ids=COMES_BACK),
        dict(_ranges=lambda *tile: (RANGES(*tile)[0], True)),
    ),
    "no cap": (
        dict(softcap=1.0),
        dict(_setting=lambda pair, causal: tokamax_calls.Setting(causal, pair.mask.scale, None)),
    ),
    "tiles that are not causal": ({}, dict(CAUSAL="unknown", _mask=lambda *tile: ((None, None), True))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tokamax_mistakes_exceed_the_bound(wrong, monkeypatch):
    arguments, replaced = WRONG[wrong]
    for name, value in replaced.items():
        monkeypatch.setattr(tokamax, name, value)
    qkv = random_qkv(0, B, T, H, K, D, dtype="bfloat16")
    attend = functools.partial(ra.blockwise_attention, impl="tokamax", **arguments)
    assert set(Bound(qkv, **arguments).too_large(results(attend, qkv))) == {"out", "dq", "dk", "dv"}


def test_gradients_of_causal_tiles_are_cut_only_where_tiles_stay_large(monkeypatch):
    sizes = []

    def differentiate(*arrays, setting):
        sizes.append((arrays[0].shape[0], arrays[1].shape[0], setting.causal))
        return _differentiate(*arrays, setting=setting)

    monkeypatch.setattr(tokamax, "_differentiate", differentiate)
    q = jax.ShapeDtypeStruct((1, 1024, 1, 8), "bfloat16")
    for smallest, expected in {2048: [(1024, 1024, True)], 512: [(512, 512, True)] * 2 + [(512, 512, False)]}.items():
        monkeypatch.setattr(tokamax, "SMALLEST_CUT", smallest)
        sizes.clear()
        attend = functools.partial(ra.blockwise_attention, impl="tokamax")
        jax.eval_shape(lambda *qkv, attend=attend: jax.vjp(attend, *qkv)[1](qkv[0]), q, q, q)
        assert sizes == expected


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_tokamax_refuses_what_it_cannot_do(monkeypatch):
    q = jnp.zeros((1, 64, 4, 16), jnp.bfloat16)
    attend = functools.partial(ra.blockwise_attention, q, q, q, impl="tokamax")
    with pytest.raises(ValueError, match='impl="tokamax" has no alibi_slopes; leave it out, or use impl="xla"'):
        attend(alibi_slopes=jnp.ones(4))
    with pytest.raises(ValueError, match='impl="tokamax" has no kv_bias'):
        attend(kv_bias=jnp.ones((1, 64)))
    with pytest.raises(ValueError, match='impl="tokamax" has no dropout_rate'):
        attend(dropout_rate=0.1, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match="takes bfloat16 or float16, got float32"):
        ra.blockwise_attention(*[q.astype("float32")] * 3, impl="tokamax")
    with pytest.raises(ValueError, match="head dims that are multiples of 8, at most 256, got 12"):
        ra.blockwise_attention(*[q[..., :12]] * 3, impl="tokamax")
    with pytest.raises(ValueError, match="needs queries and keys that are evenly spaced in a few runs"):
        attend(q_positions=jnp.arange(64))
    with pytest.raises(ValueError, match="impl='tokamax' cannot differentiate the lse"):
        attend(return_lse=True)
    monkeypatch.undo()  # which lets it run on any platform
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="impl='tokamax' runs on gpu devices, but these are cpu"):
            ra.ring_attention(q, q, q, mesh=ring_mesh(2), impl="tokamax")


H100 = Gpu("PJRT C API\ncuda 12080", (9, 0), 91200)


@pytest.mark.parametrize(
    ("gpu", "head_dim", "refused"),
    [
        (H100, 256, None),
        (None, 256, None),
        (H100._replace(cudnn=None), 128, None),
        (H100._replace(capability=(10, 3)), 128, None),
        (H100._replace(capability=(10, 0)), 136, "at most 128, got 136"),
        (H100, 264, "at most 256, got 264"),
        (H100._replace(capability=(8, 0)), 64, "compute capability 9.x or 10.x, but this is 8.0"),
        (H100._replace(capability=(12, 0)), 64, "compute capability 9.x or 10.x, but this is 12.0"),
        (H100._replace(capability=None), 64, "compute capability 9.x or 10.x, but this is one that is not known"),
        (H100._replace(stack="rocm 60300", capability=None), 64, "needs CUDA, .* 'rocm 60300'"),
    ],
)
def test_tokamax_refuses_what_a_gpu_cannot_do(gpu, head_dim, refused, monkeypatch):
    monkeypatch.setattr(tokamax, "gpu_here", lambda library: gpu)
    monkeypatch.setattr(tokamax, "_require_bindings", lambda generation: None)
    mask, q = MaskSpec(scale=1.0, softcap=30.0), jax.ShapeDtypeStruct((1, 4, 64, head_dim), "bfloat16")
    if refused is None:
        tokamax.check(mask, q)
        return
    with pytest.raises(ValueError, match=f'impl="tokamax" .*{refused}.*; use impl="xla"'):
        tokamax.check(mask, q)


def _parameters(words):
    """A function that takes arguments of these names."""
    names = ", ".join(words.split())
    return eval(f"lambda *, {names}: None")  # noqa: S307 (of words that stand in this repository)


def _modules(forward=tokamax_calls.ARGUMENTS[0], backward=tokamax_calls.ARGUMENTS[1]):
    """Modules like Tokamax's, with kernels that take these arguments."""

    def settings(**values):
        return values

    return (
        types.SimpleNamespace(flash_attention_kernel=_parameters(forward), Config=settings),
        types.SimpleNamespace(flash_attention_vjp_kernel=_parameters(backward), Config=settings),
    )


@pytest.mark.parametrize(
    ("library", "refused"),
    [
        (_modules(), None),
        (_modules(forward=f"{tokamax_calls.ARGUMENTS[0]} brand_new"), "needs brand_new"),
        (_modules(backward="q k v residuals out dout"), "does not know bias, config"),
        ((types.SimpleNamespace(), types.SimpleNamespace()), "has no attribute 'flash_attention_kernel'"),
        (ModuleNotFoundError("No module named 'tokamax'"), r"needs the package tokamax, and No module named 'tokamax'"),
    ],
    ids=["fits", "another argument", "other arguments", "gone", "not installed"],
)
def test_tokamax_is_refused_where_it_is_not_there_or_takes_other_arguments(library, refused, monkeypatch):
    monkeypatch.undo()

    def find(generation):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(tokamax, "_library", find)
    look = tokamax._require_bindings.__wrapped__
    if refused is None:
        look(9)
        look(10)
        return
    with pytest.raises(ValueError, match=f'impl="tokamax" .*{refused}.*use impl="xla"'):
        look(9)


@NEEDS_TOKAMAX
@pytest.mark.parametrize(
    ("mask", "generation"),
    [("causal", 9), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("causal", 10), ("documents", 9)])],
)
def test_tokamax_kernels_are_traced_and_lowered_for_cuda(mask, generation, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(kernels.KERNELS, "tokamax", tokamax.TOKAMAX._replace(platform=None))
    monkeypatch.setattr(tokamax, "_generation", lambda gpu: generation)
    attend = functools.partial(
        ra.ring_attention, mesh=ring_mesh(2), layout="zigzag", impl="tokamax", softcap=30.0, **MASKS[mask]
    )

    def run(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    q, k = (jax.ShapeDtypeStruct((B, T, heads, D), "bfloat16") for heads in (H, K))
    text = jax.jit(run).trace(q, k, k, q).lower(lowering_platforms=("cuda",)).as_text()
    targets = set(re.findall(r"custom_call @(\w*mosaic\w*)", text))
    assert targets, "no kernel of Pallas for GPU"
