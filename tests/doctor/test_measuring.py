"""What the doctor measures with, on a few simulated devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_attention.configs import tiny
from ring_attention.doctor.links import HOPS, _StillRing, fit, measure_links, transfers
from ring_attention.doctor.rates import Case, matmul_rate, measure
from ring_attention.doctor.step import measure_step, share_of, small_config
from ring_attention.hardware.chips import CHIPS
from ring_attention.parallel.context import context_attention
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.ring import Ring
from ring_attention.planning.hlo.compiled import totals
from ring_attention.planning.memory import memory_of
from ring_attention.planning.step_times import step_time

pytestmark = pytest.mark.usefixtures("plain_kernel")


def test_fit_finds_latency_and_bandwidth_and_neither_is_negative():
    sizes = np.array([2.0**16, 2.0**20, 2.0**26])
    assert fit(sizes, 5e-6 + sizes / 45e9) == pytest.approx((5e-6, 45e9))
    latency, bandwidth = fit(sizes, sizes / 45e9 * [1, 1, 1.2])
    assert latency == 0
    assert 30e9 < bandwidth < 45e9
    assert fit(sizes, [3e-3, 2e-3, 1e-3])[1] == pytest.approx(2.0**26 / 1e-3)


@pytest.mark.parametrize(("shift", "hops"), [(1, 3), (-1, 1)])
def test_transfers_go_so_many_places_round(shift, hops):
    mesh = make_mesh(devices=jax.devices()[:4])
    x = jnp.arange(4.0)
    program = transfers(mesh, shift, hops).lower(x).compile()
    assert totals(program.as_text())["collective-permute"][0] == hops
    np.testing.assert_array_equal(program(x), np.roll(x, shift * hops))


def test_links_have_a_rate_each_way():
    found = measure_links(make_mesh(devices=jax.devices()[:2]), [2**13, 2**18], repeats=3)
    assert [*found] == ["along", "against"]
    for way in found.values():
        assert way["bandwidth"] > 0
        assert way["latency"] >= 0
        assert [hop["bytes"] for hop in way["hops"]] == [2**13, 2**18]
    assert HOPS > 1


@pytest.mark.parametrize(("strategy", "sends"), [(Ring(), True), (_StillRing(), False)], ids=["ring", "still"])
def test_ring_without_transfers_sends_nothing(strategy, sends):
    mesh = make_mesh(devices=jax.devices()[:4])
    attend = functools.partial(context_attention, mesh=mesh, layout="zigzag", strategy=strategy)
    x = jnp.ones((1, 64, 2, 8))
    assert ("collective_permute" in jax.jit(attend).lower(x, x, x).as_text()) == sends


def test_measure_gives_both_passes_of_hops_and_of_one_call():
    case = Case(shard=32, devices=2, place=0, heads=2, kv_heads=1, head_dim=8, dtype="float32")
    found = measure(case, "xla", repeats=3, seconds=0.0)
    assert [*found] == ["forward", "backward"]
    for rates in found.values():
        assert rates["hops"] > 0
        assert rates["ratio"] == pytest.approx(rates["hops"] / rates["one call"])
    assert matmul_rate(16, 8, 32, "float32", repeats=3) > 0


@pytest.mark.slow  # compiles a training step
def test_step_of_a_small_model_is_measured_beside_the_prediction():
    config = small_config(tiny.get_config(), devices=2, tokens=32, layers=1)
    found = measure_step(config, jax.devices()[:2], repeats=3)
    assert (found["layers"], found["tokens"], found["predicted_for"]) == (1, 32, "h100")
    assert found["seconds"] > 0
    assert found["compiled_bytes"] > 0
    assert found["mfu"] is None
    share = share_of(config, CHIPS["h100"])
    assert found["predicted_bytes"] == memory_of(share, share.strategy).total


@pytest.mark.parametrize("chip", ["h100", "v5e"])
@pytest.mark.parametrize("devices", [1, 8])
def test_small_configs_can_be_predicted_for_chips(chip, devices):
    share = share_of(small_config(tiny.get_config(), devices, tokens=256, layers=4), CHIPS[chip])
    assert step_time(share, share.strategy).total > 0
    assert share.model.num_layers == 2, "no more than the config has"
