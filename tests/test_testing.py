"""The public checks of exactness pass where attention is exact, and fail where it is not."""

import dataclasses
import functools

import jax
import pytest

import ring_attention as ra


def test_check_devices_finds_the_ring_exact_on_all_devices(capsys):
    worst = ra.testing.check_devices(["ring"], tokens=8)
    assert 0 < worst["ring"] <= 2
    assert capsys.readouterr().out.startswith(f"ring, float32, {jax.device_count()} x ")


def test_check_devices_refuses_a_strategy_that_is_not_exact():
    with pytest.raises(ValueError, match="strategy='sparse' is not an exact strategy; choose from .*ring"):
        ra.testing.check_devices(["sparse"])


@pytest.mark.parametrize(("scale", "exact"), [(None, True), (0.2, False)])
def test_assert_as_exact_as_dense_takes_a_function(scale, exact):
    q, k, v, dout = ra.testing.random_qkv(0, B=1, T=24, H=2, K=1, D=16, dtype="bfloat16")
    attention = functools.partial(ra.blockwise_attention, scale=scale)
    if exact:
        assert max(ra.testing.assert_as_exact_as_dense(attention, q, k, v, dout).values()) <= 2
        return
    with pytest.raises(AssertionError, match=r"out: relative error .*, dense has .*, 2 times it allowed"):
        ra.testing.assert_as_exact_as_dense(attention, q, k, v, dout)


@dataclasses.dataclass(frozen=True)
class Prefix(ra.Mask):
    """The example of `Mask`: everybody sees the first tokens, and of the others those before."""

    length: int

    def visible(self, q_positions, k_positions):
        return (k_positions < self.length) | (q_positions >= k_positions)


def test_assert_as_exact_as_dense_takes_an_extra_mask():
    arrays = ra.testing.random_qkv(0, B=1, T=24, H=2, K=1, D=16)
    attention = functools.partial(ra.blockwise_attention, causal=False, extra_mask=Prefix(5))
    ra.testing.assert_as_exact_as_dense(attention, *arrays, causal=False, extra_mask=Prefix(5))
    with pytest.raises(AssertionError, match="out: relative error"):  # the control
        ra.testing.assert_as_exact_as_dense(attention, *arrays, causal=False, extra_mask=Prefix(6))
