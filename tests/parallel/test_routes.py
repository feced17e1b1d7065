"""Routes against brute force: who needs which token, from positions alone, and who gets it, by carrying it around."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_attention as ra
from ring_attention.parallel.routes import Route, plan_routes

PLANS = st.fixed_dictionaries(
    dict(
        kind=st.sampled_from(["contiguous", "zigzag", "striped"]),
        P=st.integers(1, 6),
        half=st.integers(1, 6),
        odd=st.booleans(),
        causal=st.booleans(),
        window=st.none() | st.integers(1, 80),
        duplex=st.booleans(),
    )
)


def _plan(kind, P, half, odd, causal, window, duplex):
    """(layout, tokens of a shard, routes, needs) of a drawn plan."""
    layout, shard_len = ra.SequenceLayout(kind, P), 2 * half + (odd and kind != "zigzag")
    routes = plan_routes(layout, shard_len, causal=causal, window=window, duplex=duplex)
    return layout, shard_len, routes, _needs(layout, shard_len, causal, window)


def _needs(layout, shard_len, causal, window):
    """Bool [P, P, t]: whether a query of a device sees token number x of another device's shard."""
    P = layout.ring_size
    positions = layout.positions(P * shard_len).astype(np.int64)
    ahead = positions[:, None] - positions[None, :]
    seen = np.abs(ahead) < (P * shard_len if window is None else window)
    seen &= (ahead >= 0) | (not causal)
    needs = seen.reshape(P, shard_len, P, shard_len).any(1)
    needs[np.arange(P), np.arange(P)] = False
    return needs


def _deliveries(routes, P):
    """How often each device gets each token of each shard: counts of (device, shard, token)."""
    counts = collections.Counter()
    for route, shard in itertools.product(routes, range(P)):
        for step in range(1, route.hops + 1):
            device = (shard + route.direction * step) % P
            counts.update((device, shard, token) for token in range(route.start, route.stop))
    return counts


@settings(max_examples=300, deadline=None)
@given(plan=PLANS)
def test_plan_routes_delivers_every_remote_token_once(plan):
    layout, _, routes, needs = _plan(**plan)
    delivered = _deliveries(routes, layout.ring_size)
    assert set(map(tuple, np.argwhere(needs))) <= set(delivered)
    assert set(delivered.values()) <= {1}
    assert all(device != shard for device, shard, _ in delivered)


def _fewest_hops(shifts, P):
    """Hops one way and the other that together bring a token to the devices `shifts` places further, tried out."""
    ways = itertools.product(range(P), repeat=2)
    return min(forth + back for forth, back in ways if all(s <= forth or P - s <= back for s in shifts))


@settings(max_examples=300, deadline=None)
@given(plan=PLANS.filter(lambda plan: plan["kind"] != "striped"))
def test_plan_routes_takes_no_token_a_hop_too_far(plan):
    layout, shard_len, routes, needs = _plan(**plan)
    P = layout.ring_size
    for token in range(shard_len):
        shifts = {(device - shard) % P for device, shard in np.argwhere(needs[:, :, token])}
        if plan["window"] is None:
            shifts = set(range(1, P))
        hops = sum(route.hops for route in routes if route.start <= token < route.stop)
        assert hops == _fewest_hops(shifts, P), f"token {token}, needed {sorted(shifts)} places further"


@settings(max_examples=100, deadline=None)
@given(plan=PLANS)
def test_plan_routes_of_one_direction_do_not_overlap(plan):
    _, shard_len, routes, _ = _plan(**plan)
    for route in routes:
        assert 0 <= route.start < route.stop <= shard_len
        assert route.direction in (1, -1)
        assert 1 <= route.hops < plan["P"]
    for direction in (1, -1):
        spans = sorted((route.start, route.stop) for route in routes if route.direction == direction)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))


# --- Examples: shards of 16 tokens, four devices ----------------------------------------------------------------------


def _routes(kind="contiguous", P=4, causal=True, window=None, duplex=False):
    return plan_routes(ra.SequenceLayout(kind, P), 16, causal=causal, window=window, duplex=duplex)


def _forth(start, stop, hops):
    return Route(start=start, stop=stop, direction=1, hops=hops)


def _back(start, stop, hops):
    return Route(start=start, stop=stop, direction=-1, hops=hops)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("causal", [True, False])
def test_plan_routes_without_window_visits_every_device(kind, causal):
    assert _routes(kind, causal=causal) == (_forth(0, 16, 3),)
    assert _routes(kind, P=1, causal=causal) == ()


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_plan_routes_of_duplex_sends_halves_opposite_ways(kind):
    assert _routes(kind, duplex=True) == (_forth(0, 8, 3), _back(8, 16, 3))


def test_plan_routes_of_duplex_with_a_short_window_is_the_same():
    assert _routes(window=5, duplex=True) == _routes(window=5)


def test_plan_routes_of_a_short_window_has_one_hop():
    assert _routes(window=5) == (_forth(12, 16, 1),)
    assert _routes(window=16) == (_forth(1, 16, 1),)
    assert _routes(window=17) == (_forth(0, 16, 1),)
    assert _routes(window=18) == (_forth(0, 15, 1), _forth(15, 16, 2))


def test_plan_routes_of_a_window_both_ways_sends_both_ends():
    assert _routes(window=5, causal=False) == (_back(0, 4, 1), _forth(12, 16, 1))


def test_plan_routes_of_a_zigzag_window_sends_chunk_ends():
    assert _routes("zigzag", window=5) == (_forth(4, 8, 1), _back(12, 16, 1))


def test_plan_routes_of_stripes_has_a_hop_for_each_window_token():
    assert _routes("striped", window=3) == (_forth(0, 16, 2),)
    assert _routes("striped", window=3, causal=False) == (_forth(0, 16, 3),)  # two hops each way would be more


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("duplex", [True, False])
def test_plan_routes_of_a_window_of_one_token_is_empty(kind, causal, duplex):
    assert _routes(kind, causal=causal, window=1, duplex=duplex) == ()
