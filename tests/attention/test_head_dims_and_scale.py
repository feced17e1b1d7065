"""Values of another head dim than the keys', and scales that are data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import Bound, quickly, results

import ring_attention as ra
from ring_attention.attention import blockwise
from ring_attention.testing import random_qkv, relative_error

T, S, H, K = 44, 60, 6, 2
BLOCKS = ra.BlockSizes(q=24, kv=16)
SOFTCAP = dict(softcap=1.5, causal=False)


@pytest.mark.parametrize(
    ("widths", "dtype"), [((24, 16), "float32"), ((8, 24), "float32"), ((24, 16), "bfloat16")], ids=str
)
def test_values_may_be_wider_or_narrower_than_keys(widths, dtype):
    qkv = random_qkv(0, 2, T, H, K, widths[0], dtype=dtype, S=S, D_v=widths[1])
    mask = dict(window=21, q_positions=np.arange(T) + 16, sinks=np.linspace(-1, 1, H))
    got = results(functools.partial(ra.blockwise_attention, block_sizes=BLOCKS), qkv, **mask)
    assert [x.shape for x in got[:4]] == [qkv[3].shape, *(x.shape for x in qkv[:3])]
    assert Bound(qkv, **mask).too_large(got) == {}


def _with_scale(attend, qkv, scale, **arguments):
    """(out, dq, dk, dv) and the gradient of a scale that is data."""
    q, k, v, dout = qkv

    @quickly
    def run(q, k, v, scale):
        out, vjp = jax.vjp(lambda q, k, v, scale: attend(q, k, v, scale=scale, **arguments), q, k, v, scale)
        return out, *vjp(dout)

    *got, of_scale = run(q, k, v, jnp.float32(scale))
    return got, of_scale


def _slope(qkv, scale, **arguments):
    """The oracle's gradient of the scale, by a difference."""
    *qkv, dout = (np.asarray(x).astype(np.float64) for x in qkv)
    ends = [(dout * ra.reference_attention(*qkv, scale=scale + step, **arguments)).sum() for step in (1e-5, -1e-5)]
    return (ends[0] - ends[1]) / 2e-5


@pytest.mark.parametrize(("dtype", "scale"), [("float32", -0.4), ("bfloat16", 0.3), ("float32", 0.0)])
def test_a_traced_scale_is_as_exact_as_one_that_is_known(dtype, scale):
    qkv = random_qkv(0, 2, T, H, K, 16, dtype=dtype, S=S)
    attend = functools.partial(ra.blockwise_attention, block_sizes=BLOCKS)
    got, of_scale = _with_scale(attend, qkv, scale, **SOFTCAP)
    if scale:
        assert Bound(qkv, scale=scale, **SOFTCAP).too_large(got) == {}
    else:
        assert [float(abs(x).max()) < 1e-12 for x in got[1:3]] == [True, True]
    want = _slope(qkv, scale, **SOFTCAP)
    assert relative_error(of_scale, want) < (2e-2 if dtype == "bfloat16" else 1e-4)
    assert abs(want) > 1  # the control: no gradient at all would not pass


def test_a_scale_without_its_gradient_is_seen(monkeypatch):
    qkv = random_qkv(0, 1, T, H, K, 16)
    monkeypatch.setattr(blockwise, "scale_gradient", lambda *_: None)
    assert float(_with_scale(ra.blockwise_attention, qkv, 0.5)[1]) == 0
    assert abs(_slope(qkv, 0.5)) > 1


def test_a_scale_may_be_data_over_sequences_and_heads_that_devices_share():
    qkv = random_qkv(0, 2, T, H, K, 16)
    mesh = ra.make_mesh(dp=2, sp=1, tp=2, devices=jax.devices()[:4])
    placed = [jax.device_put(x, jax.NamedSharding(mesh, jax.P("dp", None, "tp"))) for x in qkv]
    with jax.set_mesh(mesh):
        got, of_scale = _with_scale(ra.blockwise_attention, placed, 0.4)
    assert Bound(qkv, scale=0.4).too_large(got) == {}
    assert relative_error(of_scale, _slope(qkv, 0.4)) < 1e-4


@pytest.mark.parametrize("scale", [jnp.ones(6), jnp.int32(1)], ids=["one a head", "an integer"])
def test_a_traced_scale_is_one_number_with_a_fraction(scale):
    q = jnp.zeros((1, 8, 6, 8))
    with pytest.raises(ValueError, match="scale is .*, need one number of a floating dtype"):
        jax.eval_shape(lambda scale: ra.blockwise_attention(q, q, q, scale=scale), scale)
