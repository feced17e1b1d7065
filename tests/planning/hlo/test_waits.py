import itertools

import pytest
from hlo_texts import BACK, H100, MESH, ONE, RING, V5E, X, hlo, kernel, receive, send

from ring_attention.planning.hlo.transfers import transfers


@pytest.mark.parametrize("work", [0.0, 0.3 * ONE, 1.0 * ONE, 1.5 * ONE, 5 * ONE])
@pytest.mark.parametrize("ends", [("k", "v"), ("v", "k")])
def test_waits_of_two_together_are_beyond_the_work(work, ends):
    lines = X + send("k", "x") + send("v", "x") + (kernel("w", work) if work else "")
    found = transfers(hlo(lines + "".join(map(receive, ends))), V5E, MESH)
    assert sum(x.exposed_seconds for x in found) == pytest.approx(max(0, 2 * ONE - work), rel=1e-3, abs=1e-11)
    assert all(x.compute_seconds == pytest.approx(work, rel=1e-3) for x in found)
    assert all(-1e-12 <= x.link_seconds - x.exposed_seconds <= x.link_seconds for x in found)


def test_waits_share_links_one_way_on_tpu_both_on_gpu():
    lines = X + send("k", "x") + send("v", "x", BACK) + receive("k") + receive("v")
    assert sum(x.exposed_seconds for x in transfers(hlo(lines), V5E, MESH)) == pytest.approx(ONE)
    shared = transfers(hlo(lines), H100, MESH)
    assert sum(x.exposed_seconds for x in shared) == pytest.approx(2 * 4000 / 450e9, abs=1e-11)


def test_waits_let_a_small_transfer_past_large_ones():
    small = dict(of="f32[10]")
    lines = X + "  %y = f32[10] parameter(1)\n" + send("k", "x") + send("ids", "y", **small) + receive("ids", **small)
    key, ids = transfers(hlo(lines + kernel("w", 2 * ONE) + receive("k")), V5E, MESH)
    assert ids.exposed_seconds == pytest.approx(ids.link_seconds)
    assert key.exposed_seconds == pytest.approx(ids.link_seconds)  # on its way while the device waits for the other


def test_waits_count_every_link_of_a_far_hop_on_tpu():
    pairs = "source_target_pairs={{0,2},{1,3},{2,0},{3,1},{4,6},{5,7},{6,4},{7,5}}"
    lines = X + send("k", "x", pairs) + receive("k")
    assert transfers(hlo(lines), V5E, MESH)[0].link_seconds == pytest.approx(2 * ONE)
    assert transfers(hlo(lines), H100, MESH)[0].link_seconds == pytest.approx(4000 / 450e9)


@pytest.mark.parametrize("how", ["plain", "is_sync", "start that is never awaited here"])
def test_waits_of_synchronous_transfers_are_whole(how):
    if how == "plain":
        lines = X + f"  %k = f32[1000] collective-permute(%x), {RING}\n" + kernel("w", 9 * ONE)
    elif how == "is_sync":
        config = ', backend_config={"collective_backend_config":{"is_sync":true}}'
        lines = X + send("k", "x", more=config) + kernel("w", 9 * ONE) + receive("k")
    else:
        lines = X + kernel("w", 9 * ONE) + send("k", "x")
    (found,) = transfers(hlo(lines), V5E, MESH)
    assert found.asynchronous == (how[0] == "s")
    assert (found.compute_seconds, found.link_seconds - found.exposed_seconds) == (0, 0)
    assert found.exposed_seconds == pytest.approx(ONE)


def test_waits_add_up_in_any_order_of_starts_and_ends():
    flights = ("a", "b", "c")
    for order in itertools.permutations(flights):
        lines = X + send("a", "x") + kernel("w1", 0.5 * ONE) + send("b", "x", BACK) + send("c", "x")
        lines += kernel("w2", 0.25 * ONE) + "".join(map(receive, order))
        found = {x.name: x for x in transfers(hlo(lines), V5E, MESH)}
        total = sum(x.exposed_seconds for x in found.values())
        forth = 2 * ONE - 0.75 * ONE  # a and c share a link, which is never idle until both have arrived
        assert forth - 1e-11 <= total <= forth + 0.75 * ONE
        assert all(x.exposed_seconds <= x.link_seconds + 1e-12 for x in found.values())
