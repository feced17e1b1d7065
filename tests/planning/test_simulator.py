"""The simulator against what can be worked out by hand."""

import dataclasses

import numpy as np
import pytest

import ring_attention as ra
from ring_attention.parallel.strategies import find_strategy
from ring_attention.parallel.workload import Workload
from ring_attention.planning.balance import work_by_hop
from ring_attention.planning.simulator import Machine, seconds_of_both_passes, simulate

T, P = 256, 4
WORK = Workload(seq_len=T, devices=P, heads=4, kv_heads=4, head_dim=8)
PAIRS = T * (T + 1) / 2 * 4  # of all heads
ALIKE = Machine.of_speeds([1.0] * P)
LAYOUTS = {kind: ra.SequenceLayout(kind, P) for kind in ("contiguous", "zigzag", "striped")}


def _seconds(strategy, layout="zigzag", machine=ALIKE, work=WORK, **options):
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    return simulate(strategy, layout, work, machine, **options).seconds


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses", find_strategy("usp", {"ulysses_size": 2})])
def test_simulate_shares_work_among_devices_that_never_wait(strategy):
    assert _seconds(strategy) == pytest.approx(PAIRS / P, rel=1e-3)
    assert _seconds(strategy, backward=True) == pytest.approx(2.5 * PAIRS / P, rel=1e-3)


def test_simulate_contiguous_ring_waits_for_its_last_device():
    work = 4 * work_by_hop(LAYOUTS["contiguous"], T)
    assert _seconds("ring", "contiguous") == work.sum(1).max()
    assert _seconds("ulysses", "contiguous") == PAIRS / P  # which shares heads out, not tokens


def test_simulate_slow_device_holds_up_only_those_who_wait():
    machine = Machine.of_speeds([1.0, 0.5, 1.0, 1.0])
    assert _seconds("ring", machine=machine) == pytest.approx(2 * PAIRS / P, rel=1e-2)
    spans = simulate("ring", LAYOUTS["zigzag"], WORK, machine).spans
    ends = {i: max(span.end for span in spans if span.resource == f"device {i}") for i in range(P)}
    assert ends[1] > ends[2] > ends[3] == ends[0]  # two hops of slack are enough for the others


def test_simulate_layout_for_speeds_evens_speeds_out():
    speeds = [1.0, 0.5, 1.0, 1.0]
    layout = ra.SequenceLayout.for_speeds(speeds, 16)
    beside, blocking = (Machine.of_speeds(speeds, blocking=blocking) for blocking in (False, True))
    fair = PAIRS / sum(speeds)
    assert _seconds("ring", layout, beside) == pytest.approx(fair, rel=0.03)
    assert _seconds("all_gather", layout, blocking) == pytest.approx(fair, rel=0.03)
    assert 1.1 * fair < _seconds("ring", layout, blocking) < 0.95 * _seconds("ring", "zigzag", blocking)


def test_simulate_adds_transfers_only_where_they_block():
    hop = PAIRS / P / P
    size = 2 * WORK.bytes_of(WORK.shard, 4)
    links = dict(bandwidth=size / (hop / 2))  # half as long as a hop
    beside, blocking = (Machine.of_speeds([1.0] * P, blocking=blocking, **links) for blocking in (False, True))
    assert _seconds("ring", machine=beside) == pytest.approx(PAIRS / P, rel=1e-2)
    assert _seconds("ring", machine=blocking) == pytest.approx(PAIRS / P + 3 * hop / 2, rel=1e-2)


def test_simulate_slow_link_decides_instead():
    hop = PAIRS / P / P
    size = 2 * WORK.bytes_of(WORK.shard, 4)
    slow = Machine.of_speeds([1.0] * P, bandwidth=size / (3 * hop))
    assert _seconds("ring", machine=slow) == pytest.approx(3 * 3 * hop + hop, rel=1e-2)  # and the last hop


def test_simulate_backward_sends_gradients_too():
    size = 2 * WORK.bytes_of(WORK.shard, 4, 4)
    timeline = simulate("ring", LAYOUTS["zigzag"], WORK, Machine.of_speeds([1.0] * P, bandwidth=1e3), backward=True)
    names = [span.name for span in timeline.spans if span.resource == "link 0"]
    assert names == ["keys 1", "keys 2", "keys 3", "gradients 2", "gradients 3", "gradients 4"]
    home = next(span for span in timeline.spans if span.name == "gradients 4")
    assert home.end - home.start == pytest.approx(size / 1e3)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses", find_strategy("usp", {"ulysses_size": 2})])
def test_simulate_gives_each_resource_one_thing_at_a_time(strategy, backward):
    speeds = np.random.default_rng(0).random(P) + 0.5
    machine = Machine.of_speeds(speeds, bandwidth=1.0, latency=30.0, jitter=0.5)
    spans = simulate(strategy, LAYOUTS["zigzag"], WORK, machine, backward=backward).spans
    for name in {span.resource for span in spans}:
        own = [span for span in spans if span.resource == name]
        assert all(x.end <= y.start for x, y in zip(own, own[1:], strict=False))
        assert all(span.start < span.end for span in own)


def test_simulate_computes_a_hop_when_its_keys_are_there():
    machine = Machine.of_speeds([1.0, 0.5, 2.0, 1.0], bandwidth=1.0, jitter=0.5)
    spans = simulate("ring", LAYOUTS["zigzag"], WORK, machine).spans
    at = {(span.resource, span.name): span for span in spans}
    for device in range(P):
        for hop in range(1, P):
            sent = at[f"link {(device - 1) % P}", f"keys {hop}"]
            assert at[f"device {device}", f"hop {hop}"].start >= sent.end
            assert sent.start >= at[f"device {(device - 1) % P}", f"hop {hop - 2}"].end if hop > 1 else sent.start == 0


def test_simulate_jitter_follows_the_seed_and_makes_rings_wait():
    machine = Machine.of_speeds([1.0] * P, jitter=0.3)
    same, again, other = (_seconds("ring", machine=machine, seed=seed) for seed in (1, 1, 2))
    assert same == again != other
    mean = np.mean([_seconds("ring", machine=machine, seed=seed) for seed in range(50)])
    assert mean > 1.1 * PAIRS / P


def test_seconds_of_both_passes_is_their_sum():
    assert seconds_of_both_passes("ring", LAYOUTS["zigzag"], WORK, ALIKE) == _seconds("ring") + _seconds(
        "ring", backward=True
    )


def test_simulate_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="strategy='sparse' is not known; choose one of 'all_gather'"):
        _seconds("sparse")
    with pytest.raises(ValueError, match="got 2 speeds and a layout for 4 devices, need 4 of both"):
        _seconds("ring", machine=Machine.of_speeds([1.0, 1.0]))
    with pytest.raises(ValueError, match="3 devices cannot share 4 heads of 4 devices; choose a divisor of both"):
        _seconds(find_strategy("usp", {"ulysses_size": 3}))
    with pytest.raises(ValueError, match="transfers both ways are not simulated; leave duplex out"):
        _seconds(find_strategy("ring", {"duplex": True}))
    with pytest.raises(ValueError, match="window=7, segments=False: only full attention is simulated"):
        _seconds("ring", work=dataclasses.replace(WORK, window=7))


def test_simulate_charges_each_hop_and_transfer():
    hop = PAIRS / P / P
    machine = Machine.of_speeds([1.0] * P, hop_seconds=hop, latency=hop / 2, blocking=True)
    assert _seconds("ring", machine=machine) == pytest.approx(8 * hop + 3 * hop / 2, rel=1e-2)
