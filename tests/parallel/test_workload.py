"""The schedules that strategies state, beside the bytes that they state."""

import dataclasses

import pytest

from ring_attention.parallel.strategies import STRATEGIES, find_strategy
from ring_attention.parallel.workload import Workload, later_part

WORK = Workload(seq_len=8 * 2048, devices=8, heads=8, kv_heads=4, head_dim=64, layout="zigzag")
TIMED = ("all_gather", "ring", "ulysses", "usp")


def _sent(schedule):
    return sum(step.keys + step.gradients for step in schedule.steps)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", TIMED)
def test_schedule_sends_the_bytes_that_are_stated(name, backward):
    for strategy in STRATEGIES[name].variants(WORK, both_ways=True):
        assert _sent(strategy.schedule(WORK, backward)) == strategy.sent_bytes(WORK, backward) > 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("duplex", [False, True])
@pytest.mark.parametrize("window", [100, 1000, 5000])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_schedule_of_a_window_goes_as_far_as_its_routes(layout, window, duplex, backward):
    work = dataclasses.replace(WORK, layout=layout, window=window)
    ring = find_strategy("ring", {"duplex": duplex})
    assert _sent(ring.schedule(work, backward)) == ring.sent_bytes(work, backward) < ring.sent_bytes(WORK, backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", TIMED)
def test_schedule_computes_every_block_pair_once(name, backward):
    schedule = STRATEGIES[name].schedule(WORK, backward)
    for hop in range(schedule.work.devices):
        assert sum(step.part for step in schedule.steps if hop in step.hops) == pytest.approx(1)


def test_schedule_of_a_token_a_device_sends_its_gradients():
    work = Workload(seq_len=4, devices=4)
    ring = STRATEGIES["ring"]
    assert _sent(ring.schedule(work, backward=True)) == ring.sent_bytes(work, backward=True)


def test_later_part_counts_the_pairs_of_the_second_half():
    pairs = [(q, k) for q in range(7) for k in range(q + 1)]
    later = sum(k >= 7 // 2 for _, k in pairs)
    assert later_part(Workload(seq_len=14, devices=2)) == later / len(pairs)
    assert later_part(Workload(seq_len=14, devices=2, causal=False)) == 0.5


def test_families_are_the_classes_below_strategy():
    families = {name: strategy.family for name, strategy in STRATEGIES.items() if strategy.family != name}
    assert families == {"sliding_window": "ring", "ulysses": "usp"}
