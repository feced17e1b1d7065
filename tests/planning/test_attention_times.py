"""Closed forms against the simulator, which runs the same schedules device by device."""

import pytest

from ring_attention.hardware.rates import Wires
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.strategies import find_strategy
from ring_attention.parallel.workload import Workload
from ring_attention.planning.attention_times import Pace, add_up, price_steps
from ring_attention.planning.simulator import Machine, simulate

P, HEADS, HEAD_DIM = 8, 8, 64
RATE = 1e12


def _work(layout, causal, kv_heads):
    return Workload(
        seq_len=P * 2048, devices=P, heads=HEADS, kv_heads=kv_heads, head_dim=HEAD_DIM, layout=layout, causal=causal
    )


def _simulated(strategy, work, bandwidth, backward):
    machine = Machine.of_speeds([RATE / (4 * HEAD_DIM)] * P, bandwidth=bandwidth)
    layout = SequenceLayout(work.layout, P)
    return simulate(strategy, layout, work, machine, backward=backward).seconds


def _wires(bandwidth):
    return Wires(hop=bandwidth, hop_both=bandwidth, gather=bandwidth, swap=bandwidth, kind="")


PACE = Pace(forward=RATE, backward=RATE, memory=float("inf"))


def _times(strategy, work, bandwidth, backward, pace=PACE):
    schedule = find_strategy(strategy).schedule(work, backward)
    return add_up(price_steps(schedule, pace, _wires(bandwidth)))


@pytest.mark.parametrize("bandwidth", [1e9, 8e9, 1e12], ids=["slow", "even", "fast"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize(("layout", "causal"), [("zigzag", True), ("contiguous", False), ("striped", True)])
def test_ring_times_match_the_simulator(layout, causal, kv_heads, backward, bandwidth):
    work = _work(layout, causal, kv_heads)
    closed = _times("ring", work, bandwidth, backward).total
    assert closed == pytest.approx(_simulated("ring", work, bandwidth, backward), rel=0.03)


def test_contiguous_ring_takes_as_long_as_its_last_device():
    work = _work("contiguous", True, 8)
    closed = _times("ring", work, 1e12, False).total
    assert closed == pytest.approx(_simulated("ring", work, 1e12, False), rel=0.03)
    assert closed > 1.8 * _times("ring", _work("zigzag", True, 8), 1e12, False).total


@pytest.mark.parametrize("bandwidth", [1e9, 8e9, 1e12], ids=["slow", "even", "fast"])
@pytest.mark.parametrize("backward", [False, True])
def test_all_gather_times_match_the_simulator(backward, bandwidth):
    work = _work("zigzag", True, 4)
    closed = _times("all_gather", work, bandwidth, backward).total
    assert closed == pytest.approx(_simulated("all_gather", work, bandwidth, backward), rel=0.03)


@pytest.mark.parametrize("bandwidth", [1e9, 8e9, 1e12], ids=["slow", "even", "fast"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_usp_times_match_the_simulator(size, backward, bandwidth):
    work, usp = _work("zigzag", True, 8), find_strategy("usp", {"ulysses_size": size})
    closed = _times(usp, work, bandwidth, backward).total
    assert closed == pytest.approx(_simulated(usp, work, bandwidth, backward), rel=0.03)


def test_ring_with_a_window_computes_and_sends_less():
    full, window = _work("contiguous", True, 8), Workload(**{**vars(_work("contiguous", True, 8)), "window": 1024})
    long, short = (_times("ring", work, 1e9, False) for work in (full, window))
    assert short.compute < long.compute / 4
    assert short.wire < long.wire / 4


def test_coarse_tiles_slow_striped_and_not_zigzag():
    coarse = Pace(forward=RATE, backward=RATE, memory=float("inf"), tile=2048)
    seconds = {
        layout: _times("ring", _work(layout, True, 8), 1e12, False, coarse).total
        for layout in ("contiguous", "striped", "zigzag")
    }
    assert seconds["striped"] > 0.95 * seconds["contiguous"]
    assert seconds["zigzag"] < 0.6 * seconds["contiguous"]
