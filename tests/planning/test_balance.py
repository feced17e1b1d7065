import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from command_lines import run_here

import ring_attention as ra
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.planning.balance import balance_of, work_by_hop

REPOSITORY = Path(__file__).parents[2]
ONE_SLOW = [1, 1, 0.5, 1, 1, 1, 1, 1]
LAYOUTS = [ra.SequenceLayout(kind, P) for kind in LAYOUT_KINDS for P in (1, 3, 4)]
LAYOUTS += [ra.SequenceLayout("striped", 3, stripe=2), ra.SequenceLayout.for_speeds([1, 0.5, 2], chunks_per_shard=4)]


def _dense(layout, T, causal, window, segments):
    """The same from a mask of [B, T, T]."""
    positions, P = layout.positions(T).astype(np.int64), layout.ring_size
    distance = positions[:, None] - positions[None, :]
    sees = segments[:, :, None] == segments[:, None, :]
    if causal:
        sees &= distance >= 0
    if window is not None:
        sees &= abs(distance) < window
    pairs = sees.reshape(len(segments), P, T // P, P, T // P).sum((0, 2, 4))
    return np.array([[pairs[i, (i - hop) % P] for hop in range(P)] for i in range(P)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind}-{layout.ring_size}-{layout.stripe}")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_work_by_hop_is_that_of_the_dense_mask(layout, causal):
    T, rng = 4 * 3 * 4, np.random.default_rng(1)
    ids = rng.integers(-3, 3, (2, T), np.int32)
    for window, segments in itertools.product([None, 1, 5, T - 1, 10**30], [None, ids]):
        work = work_by_hop(layout, T, causal=causal, window=window, segment_ids=segments)
        assert work.dtype == np.int64
        one = np.zeros((1, T), np.int32) if segments is None else segments
        np.testing.assert_array_equal(work, _dense(layout, T, causal, window, one))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind}-{layout.ring_size}-{layout.stripe}")
def test_work_by_hop_sums_to_the_shares_of_the_layout(layout):
    work = work_by_hop(layout, 96)
    assert work.sum() == 96 * 97 // 2
    np.testing.assert_allclose(work.sum(1) / work.sum(), layout.work_shares(96), rtol=1e-12)


def test_work_by_hop_keeps_packed_documents_apart():
    lengths = [1, 30, 17, 48]
    segments = np.repeat(np.arange(4), lengths)[None]
    for layout in LAYOUTS:
        work = work_by_hop(layout, 96, segment_ids=layout.permute(segments, 1))
        assert work.sum() == sum(n * (n + 1) // 2 for n in lengths)


def test_work_by_hop_counts_long_sequences_without_a_mask():
    P, T = 64, 131072  # whose mask would take 16 GiB
    work, t = work_by_hop(ra.SequenceLayout("contiguous", P), T), T // P
    device, hop = np.indices((P, P))
    np.testing.assert_array_equal(work, np.where(hop > device, 0, np.where(hop == 0, t * (t + 1) // 2, t * t)))


def test_balance_of_zigzag_and_striped_is_even():
    balances = {kind: balance_of(work_by_hop(ra.SequenceLayout(kind, 8), 8192)) for kind in LAYOUT_KINDS}
    for kind in ("zigzag", "striped"):
        assert 1 <= balances[kind].total <= balances[kind].by_hop <= 1.01
    assert all(1.8 < ratio < 2.0 for ratio in balances["contiguous"])


def test_balance_of_hops_waits_for_the_slowest_of_each():
    assert balance_of(np.array([[3, 1], [1, 3]])) == (1.0, 1.5)
    assert balance_of(np.array([[3, 0], [1, 0]])) == (1.5, 1.5)
    assert balance_of(np.array([[6, 2], [1, 3]]), speeds=[2, 1]) == (1.0, 1.5)
    assert balance_of(np.array([[4], [4]]), speeds=[20, 10]) == (1.5, 1.5)


def test_balance_of_dealt_work_follows_speeds():
    layout, fair = ra.SequenceLayout.for_speeds(ONE_SLOW), np.array(ONE_SLOW) / sum(ONE_SLOW)

    def error(layout):
        work = work_by_hop(layout, 8192)
        return abs(work.sum(1) / work.sum() / fair - 1).max()

    assert error(layout) < 0.01
    assert error(ra.SequenceLayout("zigzag", 8)) > 0.8
    balance = balance_of(work_by_hop(layout, 8192), ONE_SLOW)
    assert balance.total < 1.01
    assert balance.by_hop > 1.2  # even in all, not at each hop: waiting at every hop loses much of what dealing gains
    zigzag = balance_of(work_by_hop(ra.SequenceLayout("zigzag", 8), 8192), ONE_SLOW)
    assert zigzag.total == pytest.approx(zigzag.by_hop) == 1.875
    assert balance.by_hop < zigzag.by_hop


@pytest.mark.parametrize(
    ("speeds", "device"),
    [([1, 100], 0), ([1, 100], 1), ([1, 100, 1], 1), ([1, 1, 1, 1, 1, 1, 1, 100], 7), ([1, 1, 1e-3, 1], 2)],
    ids=str,
)
def test_for_speeds_gives_an_extreme_speed_the_limit(speeds, device):
    P, T = len(speeds), 6144
    t, work = T // P, work_by_hop(ra.SequenceLayout.for_speeds(speeds), T).sum(1)
    if speeds[device] == 100:
        assert work[device] == sum(range(T - t + 1, T + 1))  # of the last tokens
        assert work[device] / work.sum() == pytest.approx((2 * P - 1) / P**2, abs=1 / T)
    else:
        assert work[device] == sum(range(1, t + 1))  # of the first
        assert work[device] / work.sum() == pytest.approx(1 / P**2, abs=1 / T)


def test_work_by_hop_and_balance_of_refuse_in_words():
    layout = ra.SequenceLayout("zigzag", 4)
    with pytest.raises(ValueError, match="seq_len=12 is not divisible by 2.sp .zigzag.=8; pad to 16"):
        work_by_hop(layout, 12)
    with pytest.raises(ValueError, match="seq_len=0 must be positive; choose at least 8"):
        work_by_hop(layout, 0)
    with pytest.raises(ValueError, match="window=0 must be a whole number"):
        work_by_hop(layout, 16, window=0)
    with pytest.raises(ValueError, match=re.escape("segment_ids has shape (16,), need [B=any, T=16]")):
        work_by_hop(layout, 16, segment_ids=np.zeros(16, int))
    with pytest.raises(ValueError, match="segment_ids has dtype float64, need integers"):
        work_by_hop(layout, 16, segment_ids=np.zeros((1, 16)))
    with pytest.raises(ValueError, match="not all zero"):
        balance_of(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=re.escape("speeds has shape (3,), need [P=2]")):
        balance_of(np.ones((2, 2)), speeds=[1, 1, 1])
    with pytest.raises(ValueError, match=re.escape("speeds=[1.0, 0.0] must be positive")):
        balance_of(np.ones((2, 2)), speeds=[1, 0])


def _show_balance(*flags):
    return run_here("figures balance", *flags)


def test_show_balance_prints_a_row_for_each_layout_and_draws_them(tmp_path):
    picture = tmp_path / "balance.png"
    flags = ["--devices", 4, "--seq_len", 4096, "--window", 3000, "--documents", 3, "--speeds", "1 0.5 1 1"]
    done = _show_balance(*flags, "--out", picture)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ (\w+) +│([^\n]*)│", done.stdout)
    assert [name for name, _ in rows] == [*LAYOUT_KINDS, "dealt"]
    for _, numbers in rows:
        least, most, total, by_hop, time, time_by_hop = map(float, numbers.split("│"))
        assert 0 < least <= 1 <= most == total <= by_hop
        assert 1 <= time <= time_by_hop
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_balance_says_in_a_line_what_is_wrong():
    done = _show_balance("--devices", 4, "--speeds", "1 1")
    assert done.returncode == 2
    assert "speeds=[1.0, 1.0]: need 4 numbers" in done.stderr.splitlines()[-1]
    done = _show_balance("--seq_len", 1001)
    assert done.returncode == 2
    assert "seq_len=1001 is not divisible" in done.stderr.splitlines()[-1]
