"""Closed forms against the simulator, which steps through the same schedules device by device."""

import pytest

from ring_attention.hardware.rates import Wires
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.workload import Workload
from ring_attention.planning.attention_times import Pace, all_gather_times, ring_times, usp_times
from ring_attention.planning.simulator import Machine, simulate

P, HEADS, HEAD_DIM = 8, 8, 64
RATE = 1e12


def _work(layout, causal, kv_heads):
    return Workload(
        seq_len=P * 2048, devices=P, heads=HEADS, kv_heads=kv_heads, head_dim=HEAD_DIM, layout=layout, causal=causal
    )


def _simulated(strategy, work, bandwidth, backward, size=1):
    machine = Machine.of_speeds([RATE / (4 * HEAD_DIM)] * P, bandwidth=bandwidth)
    layout = SequenceLayout(work.layout, P)
    return simulate(strategy, layout, work, machine, backward=backward, ulysses_size=size).seconds


def _wires(bandwidth):
    return Wires(hop=bandwidth, hop_both=bandwidth, gather=bandwidth, swap=bandwidth, kind="")


PACE = Pace(forward=RATE, backward=RATE, memory=float("inf"))


@pytest.mark.parametrize("bandwidth", [1e9, 8e9, 1e12], ids=["slow", "even", "fast"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize(("layout", "causal"), [("zigzag", True), ("contiguous", False), ("striped", True)])
def test_a_ring_takes_as_long_as_simulated(layout, causal, kv_heads, backward, bandwidth):
    work = _work(layout, causal, kv_heads)
    closed = ring_times(work, PACE, _wires(bandwidth), backward).total
    assert closed == pytest.approx(_simulated("ring", work, bandwidth, backward), rel=0.03)


def test_contiguous_and_causal_takes_as_long_as_its_last_device():
    work = _work("contiguous", True, 8)
    closed = ring_times(work, PACE, _wires(1e12), False).total
    assert closed == pytest.approx(_simulated("ring", work, 1e12, False), rel=0.03)
    assert closed > 1.8 * ring_times(_work("zigzag", True, 8), PACE, _wires(1e12), False).total


@pytest.mark.parametrize("bandwidth", [1e9, 8e9, 1e12], ids=["slow", "even", "fast"])
@pytest.mark.parametrize("backward", [False, True])
def test_all_gather_takes_as_long_as_simulated(backward, bandwidth):
    work = _work("zigzag", True, 4)
    closed = all_gather_times(work, PACE, _wires(bandwidth), backward).total
    assert closed == pytest.approx(_simulated("all_gather", work, bandwidth, backward), rel=0.03)


@pytest.mark.parametrize("bandwidth", [1e9, 8e9, 1e12], ids=["slow", "even", "fast"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_usp_takes_as_long_as_simulated(size, backward, bandwidth):
    work, wires = _work("zigzag", True, 8), _wires(bandwidth)
    closed = usp_times(work, PACE, wires, wires, backward, size).total
    assert closed == pytest.approx(_simulated("usp", work, bandwidth, backward, size), rel=0.03)


def test_a_window_shortens_both_computing_and_sending():
    full, window = _work("contiguous", True, 8), Workload(**{**vars(_work("contiguous", True, 8)), "window": 1024})
    long, short = (ring_times(work, PACE, _wires(1e9), False) for work in (full, window))
    assert short.compute < long.compute / 4
    assert short.wire < long.wire / 4


def test_coarse_tiles_take_the_gain_of_striped_away_and_leave_that_of_zigzag():
    coarse = Pace(forward=RATE, backward=RATE, memory=float("inf"), tile=2048)
    seconds = {
        layout: ring_times(_work(layout, True, 8), coarse, _wires(1e12), False).total
        for layout in ("contiguous", "striped", "zigzag")
    }
    assert seconds["striped"] > 0.95 * seconds["contiguous"]
    assert seconds["zigzag"] < 0.6 * seconds["contiguous"]
