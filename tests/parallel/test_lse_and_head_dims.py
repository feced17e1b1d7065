"""What every exact strategy does, too: the lse and its gradients, values of another width, a traced scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import PLAIN, quickly, ring_mesh

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.reference import reference_gradients
from ring_attention.parallel import context, strategy, ulysses
from ring_attention.testing import dense_attention, random_qkv, random_segments, relative_error

B, T, H, K, D, D_V, SCALE = 2, 48, 8, 4, 6, 10, 0.3
MASK = dict(window=19, segment_ids=random_segments(1, B, T, count=3), sinks=np.linspace(-1, 1, H, dtype=np.float32))
RESULTS = ("out", "lse", "dq", "dk", "dv", "dscale")
DLSE = np.random.default_rng(6).standard_normal((B, T, H)).astype(np.float32)

CASES = [
    ("ring", 2, "zigzag", "float32"),
    ("ring", 3, "striped", "float32"),
    ("ring", 8, "zigzag", "bfloat16"),
    ("all_gather", 3, "zigzag", "float32"),
    ("ulysses", 2, "zigzag", "float32"),
    ("usp", 4, "zigzag", "bfloat16"),
    ("sliding_window", 3, "contiguous", "float32"),
    ("ring_self_attention", 2, "zigzag", "float32"),
    ("single_device", 1, "contiguous", "float32"),
]


@functools.cache
def _inputs(dtype):
    return random_qkv(0, B, T, H, K, D, dtype=dtype, D_v=D_V)


def _all(attend, q, k, v, dout):
    """What RESULTS names, of `attend(q, k, v, scale)`, which gives out and lse."""

    @quickly
    def run(q, k, v, scale, dout, dlse):
        results, vjp = jax.vjp(attend, q, k, v, scale)
        return *results, *vjp((dout, dlse))

    return run(q, k, v, jnp.float32(SCALE), dout, jnp.asarray(DLSE))


@functools.cache
def _limits(dtype):
    """The oracle's results, and twice the error of dense attention, of each."""
    q, k, v, dout = _inputs(dtype)
    out, lse = ra.reference_attention(q, k, v, scale=SCALE, return_lse=True, **MASK)
    dq, dk, dv, _ = reference_gradients(q, k, v, dout, dlse=DLSE, scale=SCALE, **MASK)
    want = (out, lse, dq, dk, dv, (dq * np.asarray(q, np.float64)).sum() / SCALE)

    def dense(q, k, v, scale):
        return dense_attention(q, k, v, scale=scale, return_lse=True, **MASK)

    got = _all(dense, q, k, v, dout)
    limits = [2 * relative_error(x, y) for x, y in zip(got, want, strict=True)]
    limits[5] = max(limits[5], 1e-2 if dtype == "bfloat16" else 1e-5)  # one number, which dense may have by luck
    return want, limits


def _results(name, P, kind, dtype, **options):
    layout = ra.SequenceLayout(kind, P)
    arguments = MASK | dict(segment_ids=layout.permute(MASK["segment_ids"], 1), sinks=jnp.asarray(MASK["sinks"]))
    options |= dict(ulysses_size=2) if name == "usp" else {}

    def attend(q, k, v, scale):
        q, k, v = (layout.permute(x, 1) for x in (q, k, v))
        settings = dict(mesh=ring_mesh(P), layout=layout, strategy=name, impl="plain", scale=scale, return_lse=True)
        return tuple(layout.unpermute(x, 1) for x in ra.context_attention(q, k, v, **settings, **arguments, **options))

    return _all(attend, *_inputs(dtype))


def _too_large(got, dtype):
    want, limits = _limits(dtype)
    found = zip(RESULTS, got, want, limits, strict=True)
    return {name for name, x, y, limit in found if not relative_error(x, y) <= limit}


@pytest.mark.parametrize(("name", "P", "kind", "dtype"), CASES, ids=lambda x: str(x))
def test_lse_other_widths_and_a_traced_scale_are_as_exact_as_dense(name, P, kind, dtype):
    got = _results(name, P, kind, dtype)
    assert [x.shape for x in got[:2]] == [(B, T, H, D_V), (B, T, H)]
    assert [x.dtype for x in got[:2]] == [dtype, "float32"]
    assert _too_large(got, dtype) == set()


def test_every_exact_strategy_is_among_these():
    assert {name for name, *_ in CASES} == {name for name, x in ra.STRATEGIES.items() if x.exact}


def _without_dlse(out, lse, dout, dlse, rounding=None):
    return _STATS(out, lse, dout, rounding=rounding)


_STATS = GlobalStats.of
MUTANTS = {
    "no gradient of the lse": ("ring", {"dq", "dk", "dscale"}),
    "no gradient of the scale": ("ring", {"dscale"}),
    "the lse of other heads": ("ulysses", {"lse", "dq", "dk", "dscale"}),
}


@pytest.mark.parametrize("wrong", MUTANTS)
def test_mistakes_of_lse_and_scale_exceed_the_bound(wrong, monkeypatch):
    name, want = MUTANTS[wrong]
    if wrong == "no gradient of the lse":
        monkeypatch.setattr(GlobalStats, "of", staticmethod(_without_dlse))
    elif wrong == "no gradient of the scale":
        monkeypatch.setattr(strategy, "scale_gradient", lambda *_: None)
    else:
        right = ulysses.Swap.tokens_for_heads
        monkeypatch.setattr(
            ulysses.Swap, "tokens_for_heads", lambda self, x: right(self, jnp.flip(x, 1) if x.ndim == 3 else x)
        )
    context._sharded.cache_clear()
    try:
        assert _too_large(_results(name, 2, "zigzag", "float32"), "float32") >= want
    finally:
        context._sharded.cache_clear()


def test_the_lse_merges_what_two_calls_saw():
    qkv = random_qkv(1, 1, 32, 2, 2, 8)[:3]
    attend = functools.partial(ra.ring_attention, mesh=ring_mesh(2), impl="plain", causal=False, return_lse=True)

    @quickly
    def run(q, k, v):
        own, other = (x.at[:].set(y) for x, y in ((k, k), (k, 1 - k)))
        (out, lse), (more, beside) = attend(q, own, v), attend(q, other, 2 * v)
        both = jnp.logaddexp(lse, beside)
        return out * jnp.exp(lse - both)[..., None] + more * jnp.exp(beside - both)[..., None]

    q, k, v = qkv
    want = ra.reference_attention(q, jnp.concatenate([k, 1 - k], 1), jnp.concatenate([v, 2 * v], 1), causal=False)
    assert relative_error(run(*qkv), want) < 1e-6


@pytest.mark.parametrize("tokens", [45, 48])
def test_the_lse_inside_a_shard_map_and_of_padded_sequences(tokens):
    q, k, v, _ = random_qkv(2, 1, tokens, 2, 1, 8)
    want = ra.reference_attention(q, k, v, return_lse=True)
    if tokens == 45:  # eight devices do not divide it
        got = ra.ring_attention(q, k, v, mesh=ring_mesh(8), impl="plain", return_lse=True)
    else:
        attend = functools.partial(ra.context_attention_shard, impl="plain", return_lse=True)
        spec = jax.P(None, "sp")
        got = quickly(jax.shard_map(attend, mesh=ring_mesh(3), in_specs=spec, out_specs=(spec, spec)))(q, k, v)
    assert [relative_error(x, y) < 1e-6 for x, y in zip(got, want, strict=True)] == [True, True]


def test_lse_is_refused_where_a_kernel_cannot_differentiate_it(monkeypatch):
    q = jnp.zeros((1, 16, 2, 8), jnp.bfloat16)
    monkeypatch.setitem(kernels.KERNELS, "plain", PLAIN._replace(differentiates_lse=False))
    with pytest.raises(ValueError, match="impl='plain' cannot differentiate the lse; leave return_lse out"):
        ra.ring_attention(q, q, q, mesh=ring_mesh(2), impl="plain", return_lse=True)
    with pytest.raises(ValueError, match=r"return_lse=1 must be True or False"):
        ra.ring_attention(q, q, q, mesh=ring_mesh(2), return_lse=1)
