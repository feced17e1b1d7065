import pytest

from ring_attention.parallel.workload import Workload
from scripts.figures.worked_example import GiB, attention_seconds, broadcast_bytes, traffic, worked_example


def test_broadcast_bytes_are_those_commonly_reckoned():
    reckoned = broadcast_bytes(2**20, 4096, 8)
    assert reckoned == 64 * GiB
    assert reckoned / (200 * GiB) == 0.32


def test_worked_example_says_what_is_really_sent():
    found = worked_example()
    assert found["ring"].sent == 14 * GiB  # K and V, of all devices but this
    assert found["ring"].total == 8 * 14 * GiB
    assert found["ring"].seconds == 0.07
    assert found["all_gather"] == found["ring_self_attention"] == found["ring"]
    assert found["ulysses"].sent == 3.5 * GiB  # a quarter: q, k, v and out, each an eighth of the sequence, 7/8 of it
    assert found["ulysses"].sent < found["usp"].sent < found["ring"].sent
    assert found["sliding_window"].sent == 2 * 4095 * 4096 * 2


def test_attention_seconds_exceed_the_broadcast():
    work = Workload(seq_len=2**20, devices=8, heads=32, kv_heads=32, head_dim=128)
    assert attention_seconds(work, 400e12) == pytest.approx(2 * 2**40 * 4096 / 8 / 400e12, rel=1e-5)
    assert attention_seconds(work, 400e12) > 5 * 0.32
    assert traffic("ring", work, 200 * GiB).seconds < 0.1


def test_worked_example_leaves_out_what_cannot_be():
    found = worked_example(devices=64)  # for 32 heads
    assert found["ulysses"] is None
    assert found["ring"].sent == 2 * 63 * 2**20 // 64 * 4096 * 2
