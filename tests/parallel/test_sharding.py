import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.parallel.sharding import (
    RULES,
    TOKEN_AXES,
    check_fits,
    gather_weight,
    resized,
    spec_of,
    stored_shape,
)
from ring_attention.testing import relative_error

ROWS, TOKENS, M, F = 4, 32, 8, 12
BATCH = Spec(("dp", "fsdp"), "sp")


def test_spec_of_lists_the_mesh_axes_of_each_logical_axis():
    assert spec_of(("model", "heads", "head_dim")) == Spec(("fsdp", "sp"), ("tp",), None)
    assert spec_of(("batch", "sequence")) == Spec(("dp", "fsdp"), ("sp",))
    mesh = ra.make_mesh(fsdp=2, sp=2, tp=2)
    assert NamedSharding(mesh, spec_of(("vocab", "model"))).shard_shape((64, 32)) == (32, 8)


def test_spec_of_refuses_two_logical_axes_on_one_mesh_axis():
    message = "logical axes ('heads', 'ffn') use a mesh axis twice: ['tp', 'tp']; change the table RULES"
    with pytest.raises(ValueError, match=re.escape(message)):
        spec_of(("heads", "ffn"))
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        spec_of(("sequence", "model"))


def test_check_fits_refuses_a_size_with_the_next_that_fits():
    shape = dict(dp=1, fsdp=2, sp=4, tp=3)
    check_fits("model.ffn_dim", 24, "ffn", shape)
    message = "model.ffn_dim=20 is not divisible by tp=3; use 21 or fewer devices on these axes of the mesh"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_fits("model.ffn_dim", 20, "ffn", shape)


def test_stored_shape_pads_each_axis_to_equal_parts():
    shape = dict(dp=1, fsdp=2, sp=3, tp=2)
    assert stored_shape((32, 16), spec_of(("vocab", "model")), shape) == (32, 18)
    assert stored_shape((3, 16, 24), spec_of(("layers", "model", "ffn")), shape) == (3, 18, 24)
    assert stored_shape((16,), spec_of(("norm",)), shape) == (16,)
    x = np.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(resized(resized(x, (3, 8)), (2, 6)), x)
    assert resized(x, (3, 8)).sum() == x.sum()


@pytest.mark.parametrize("shape", [dict(dp=2, fsdp=2, sp=2), dict(fsdp=2, sp=2, tp=2), dict(dp=2, sp=4)], ids=str)
@pytest.mark.parametrize("axes", [("model", "ffn"), ("ffn", "model"), ("norm",)], ids=str)
def test_gathered_weight_has_the_gradient_of_all_tokens(shape, axes):
    mesh, rng = ra.make_mesh(**shape), np.random.default_rng(0)
    size = dict(model=M, ffn=F, norm=M)
    w = jnp.asarray(rng.standard_normal([size[axis] for axis in axes]), jnp.float32)
    c = jnp.asarray(rng.standard_normal((ROWS, TOKENS)), jnp.float32)  # other tokens on each device
    whole_spec = Spec(*(None if axis == "model" else spec_of((axis,))[0] for axis in axes))

    @jax.shard_map(mesh=mesh, in_specs=spec_of(axes), out_specs=whole_spec, check_vma=False)
    def gathered(w):
        return gather_weight(w, axes, jnp.dtype("float32"))

    np.testing.assert_array_equal(gathered(w), w)

    @jax.shard_map(mesh=mesh, in_specs=(spec_of(axes), BATCH), out_specs=Spec())
    def loss(w, c):
        whole = gather_weight(w, axes, jnp.dtype("float32"))
        here = (jnp.sin(c[..., None, None] * whole)).sum()
        shared = RULES["ffn"] if "ffn" in axes else ()
        return lax.psum(here, (*TOKEN_AXES, *shared))

    got_loss, got = jax.jit(jax.value_and_grad(loss))(w, c)
    want_loss, want = jax.value_and_grad(lambda w: jnp.sin(c[..., None, None] * w).sum())(w)
    assert abs(got_loss - want_loss) < 1e-4 * abs(want_loss)
    assert relative_error(got, want) < 1e-5
    first_device_only = jax.grad(lambda w: jnp.sin(c[:1, :8, None, None] * w).sum())(w)
    assert relative_error(first_device_only, want) > 0.1  # the control: a gradient that was not summed


def test_gathered_weight_gradient_lets_tangents_through():
    mesh, axes = ra.make_mesh(fsdp=2, devices=jax.devices()[:2]), ("model", "ffn")
    w = jnp.linspace(-1, 1, M * F).reshape(M, F)

    @jax.shard_map(mesh=mesh, in_specs=spec_of(axes), out_specs=Spec())
    def loss(w):
        return lax.pmean(jnp.sin(gather_weight(w, axes, w.dtype)).sum(), (*TOKEN_AXES, "tp"))

    got = jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (jnp.ones_like(w),))[1])(w)
    assert relative_error(got, -jnp.sin(w)) < 1e-5


def test_gathered_bfloat16_weight_sums_gradients_in_float32():
    mesh, axes = ra.make_mesh(fsdp=2, sp=4), ("model", "ffn")
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal((M, F)), jnp.float32)
    c = jnp.asarray(1 + 2.0**-7 * rng.integers(0, 2, (2, 4, M, F)), jnp.float32)  # exact in bfloat16; sums are not

    @jax.shard_map(mesh=mesh, in_specs=(spec_of(axes), Spec("fsdp", "sp")), out_specs=Spec())
    def loss(w, c):
        whole = gather_weight(w, axes, jnp.dtype("bfloat16"))
        assert whole.dtype == jnp.bfloat16
        return lax.psum((whole * c[0, 0].astype("bfloat16")).astype(jnp.float32).sum(), (*TOKEN_AXES, "tp"))

    gradient = jax.jit(jax.grad(loss))
    got, want = gradient(w, c), c.sum((0, 1))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)
    in_bfloat16 = functools.reduce(lambda a, b: (a + b).astype("bfloat16"), c.reshape(8, M, F).astype("bfloat16"))
    assert np.abs(np.asarray(in_bfloat16, np.float32) - want).max() > 0.01  # the control
    gathers = [line for line in jax.jit(loss).lower(w, c).as_text().splitlines() if "all_gather" in line]
    assert gathers
    assert all("bf16>) -> tensor" in line for line in gathers)
