import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention.attention.intervals import Intervals
from ring_attention.attention.mask_spec import MaskSpec, bounded
from ring_attention.attention.masks import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockPair,
    Tokens,
    tile_kinds,
    visible,
)

Q, KV, Q_TILE, KV_TILE = 24, 30, 6, 5

MASKS = st.builds(
    MaskSpec,
    scale=st.just(1.0),
    causal=st.booleans(),
    window=st.none()
    | st.sampled_from([1, 2, 5, 13, 50])
    | st.tuples(*2 * [st.none() | st.sampled_from([0, 1, 5, 13])]),
    seq_len=st.none() | st.sampled_from([1, 7, 20, 39, 60]),
)


def _tokens(rng, count, packed, kind, intervals=False, padded=False):
    """Tokens with positions in 0 ... 39 and segments in 0 ... 2; intervals are often as long as what all are in."""
    if kind == "consecutive":
        positions = rng.integers(0, 40 - count + 1) + np.arange(count)
    else:
        positions = rng.integers(0, 40, count)
    segments = rng.integers(0, 3, (1, count)) if packed else None
    if kind != "scattered":
        positions, segments = np.sort(positions), np.sort(segments) if packed else None
    low, high = (None, None)
    if intervals:
        low = (positions // (size := rng.integers(1, 30)) * size - rng.integers(0, 3))[None]
        high = low + rng.choice([0, size, size + 9], (1, 1) if rng.random() < 0.5 else (1, count))
    real = (np.arange(count) < rng.integers(count // 2, count + 1))[None] if padded else None
    fields = jax.tree.map(jnp.asarray, (segments, real, low, high))
    return Tokens(jnp.asarray(positions[None]), fields[0], None, *fields[1:])


def _seen(mask, queries, keys):
    """What `visible` says of all pairs, [q,kv]."""
    across, down = jax.tree.map(lambda x: x[0, :, None], queries), jax.tree.map(lambda x: x[0, None, :], keys)
    seen, shape = visible(mask, across, down), (queries.positions.size, keys.positions.size)
    return np.ones(shape, bool) if seen is None else np.broadcast_to(np.asarray(seen), shape)


def _may_see(mask, queries, keys, q, k):
    """Whether query number q sees key number k, said once more in words of one pair."""
    here, there = int(queries.positions[0, q]), int(keys.positions[0, k])
    left, right = (
        mask.window if isinstance(mask.window, tuple) else [None if mask.window is None else mask.window - 1] * 2
    )
    near = (left is None or here - there <= left) and (right is None or there - here <= right)
    shown = near and not (mask.causal and there > here)
    if queries.low is not None:
        inside = queries.low[0, q] <= there < queries.high[0, q]
        shown = shown or inside if mask.causal else shown and inside
    return shown and not (
        (mask.seq_len is not None and (here >= mask.seq_len or there >= mask.seq_len))
        or (queries.segments is not None and queries.segments[0, q] != keys.segments[0, k])
        or (keys.real is not None and not keys.real[0, k])
    )


@settings(max_examples=40, deadline=None)
@given(mask=MASKS, packed=st.booleans(), more=st.booleans(), seed=st.integers(0, 10_000))
def test_visible_shows_what_all_conditions_allow(mask, packed, more, seed):
    rng = np.random.default_rng(seed)
    queries = _tokens(rng, 7, packed, "scattered", intervals=more)
    keys = _tokens(rng, 9, packed, "scattered", padded=more)
    queries, keys = jax.tree.map(np.asarray, (queries, keys))
    want = [[_may_see(mask, queries, keys, q, k) for k in range(9)] for q in range(7)]
    np.testing.assert_array_equal(_seen(mask, queries, keys), want)


def test_visible_is_none_where_nothing_is_hidden():
    tokens = Tokens(jnp.arange(4)[None])
    assert visible(MaskSpec(scale=1.0, causal=False), tokens, tokens) is None
    assert visible(MaskSpec(scale=1.0), tokens, tokens) is not None


@settings(max_examples=100, deadline=None)
@given(
    mask=MASKS,
    packed=st.booleans(),
    kind=st.sampled_from(["scattered", "sorted", "consecutive"]),
    intervals=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_tile_kinds_empty_hides_all_full_hides_nothing(mask, packed, kind, intervals, padded, seed):
    rng = np.random.default_rng(seed)
    queries, keys = _tokens(rng, Q, packed, kind, intervals), _tokens(rng, KV, packed, kind, padded=padded)
    seen = _seen(mask, queries, keys)
    tiles = seen.reshape(Q // Q_TILE, Q_TILE, KV // KV_TILE, KV_TILE).swapaxes(1, 2).reshape(4, 6, -1)
    kinds = np.asarray(tile_kinds(BlockPair(queries.tiles(Q_TILE), keys.tiles(KV_TILE), mask)))[0]
    assert kinds.shape == (4, 6)
    assert not tiles[kinds == EMPTY].any()
    assert tiles[kinds == FULL].all()
    if (
        kind == "consecutive" and not (packed or intervals or padded) and mask.seq_len is None
    ):  # then the bounds say all there is to say
        np.testing.assert_array_equal(kinds == EMPTY, ~tiles.any(-1))
        np.testing.assert_array_equal(kinds == FULL, tiles.all(-1))


def _kinds(mask, tokens, size):
    return np.asarray(tile_kinds(BlockPair(tokens.tiles(size), tokens.tiles(size), mask)))[0].tolist()


# Twelve tokens in three tiles.
KINDS = {
    "causal": (dict(), [[PARTIAL, EMPTY, EMPTY], [FULL, PARTIAL, EMPTY], [FULL, FULL, PARTIAL]]),
    "all": (dict(causal=False), [[FULL] * 3] * 3),
    "a window as long as a tile": (
        dict(window=4),
        [[PARTIAL, EMPTY, EMPTY], [PARTIAL, PARTIAL, EMPTY], [EMPTY, PARTIAL, PARTIAL]],
    ),
    "a window of itself": (dict(window=1), [[PARTIAL, EMPTY, EMPTY], [EMPTY, PARTIAL, EMPTY], [EMPTY, EMPTY, PARTIAL]]),
    "a window both ways": (
        dict(causal=False, window=5),
        [[FULL, PARTIAL, EMPTY], [PARTIAL, FULL, PARTIAL], [EMPTY, PARTIAL, FULL]],
    ),
    "a window of two sides": (
        dict(causal=False, window=(3, None)),
        [[FULL, FULL, FULL], [PARTIAL, FULL, FULL], [EMPTY, PARTIAL, FULL]],
    ),
    "padding": (dict(causal=False, seq_len=8), [[FULL, FULL, EMPTY], [FULL, FULL, EMPTY], [EMPTY, EMPTY, EMPTY]]),
    "padding within a tile": (
        dict(causal=False, seq_len=7),
        [[FULL, PARTIAL, EMPTY], [PARTIAL, PARTIAL, EMPTY], [EMPTY, EMPTY, EMPTY]],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_tile_kinds_of_a_square_are_as_drawn(name):
    arguments, want = KINDS[name]
    assert _kinds(MaskSpec(scale=1.0, **arguments), Tokens(jnp.arange(12)[None]), 4) == want


def test_tile_kinds_of_different_documents_are_empty():
    tokens = Tokens(jnp.arange(12)[None], jnp.array([[1] * 8 + [2] * 4]))
    want = [[FULL, FULL, EMPTY], [FULL, FULL, EMPTY], [EMPTY, EMPTY, FULL]]
    assert _kinds(MaskSpec(scale=1.0, causal=False), tokens, 4) == want


INTERVALS = {
    "a prefix of a tile": (
        dict(in_prefix=np.arange(12)[None] < 4),
        {},
        [[FULL, EMPTY, EMPTY], [FULL, PARTIAL, EMPTY], [FULL, FULL, PARTIAL]],
    ),
    "block-causal": (dict(size=8), {}, [[FULL, FULL, EMPTY], [FULL, FULL, EMPTY], [FULL, FULL, FULL]]),
    "block-causal in a window": (
        dict(size=8),
        dict(window=5),
        [[FULL, FULL, EMPTY], [FULL, FULL, EMPTY], [EMPTY, PARTIAL, FULL]],
    ),
    "chunks alone": (
        dict(size=8),
        dict(causal=False),
        [[FULL, FULL, EMPTY], [FULL, FULL, EMPTY], [EMPTY, EMPTY, FULL]],
    ),
    "an image over a border": (
        dict(block_ids=np.array([[-1] * 2 + [7] * 8 + [-1] * 2])),
        {},
        [[PARTIAL] * 3, [FULL, FULL, PARTIAL], [FULL, FULL, PARTIAL]],
    ),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_tile_kinds_of_intervals_are_as_drawn(name):
    arguments, mask, want = INTERVALS[name]
    make = {"in_prefix": Intervals.prefix, "block_ids": Intervals.blocks, "size": Intervals.chunks}[
        next(iter(arguments))
    ]
    start, stop = make(**arguments, **(dict(positions=np.arange(12)) if "size" in arguments else {}))
    tokens = Tokens(jnp.arange(12)[None], low=start, high=stop)
    assert _kinds(MaskSpec(scale=1.0, **mask), tokens, 4) == want


def test_intervals_drawing_is_what_visible_shows():
    lines = inspect.getdoc(Intervals).splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip().startswith("1 1 0 0 0"))
    rows = [[int(number) for number in line.split()] for line in lines[first : first + 5]]
    drawn, positions = np.array(rows).reshape(5, 4, 5).swapaxes(0, 1), np.arange(5)
    made = (
        (Intervals.prefix(positions[None] < 2), True),
        (Intervals.blocks(np.array([[0, 1, 1, 2, 3]])), True),
        (Intervals.chunks(positions, 2), True),
        (Intervals.chunks(positions, 2), False),
    )
    for matrix, ((start, stop), causal) in zip(drawn, made, strict=True):
        queries = Tokens(positions[:, None], low=start[0][:, None], high=stop[0][:, None])
        np.testing.assert_array_equal(
            matrix, visible(MaskSpec(scale=1.0, causal=causal), queries, Tokens(positions[None]))
        )


def test_intervals_follow_documents_and_end_with_them():
    documents = np.array([[5, 5, 5, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]])
    start, stop = Intervals.prefix(np.array([[1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]], bool), documents)
    np.testing.assert_array_equal(start, [[0, 0, 0, 3, 3, 3, 3], [0] * 7])
    np.testing.assert_array_equal(stop, [[2, 2, 2, 4, 4, 4, 4], [3] * 7])
    start, stop = Intervals.blocks(np.array([[-1, -1, 4, 4, 4, 3, -1]]))
    np.testing.assert_array_equal([start[0], stop[0]], [[0, 1, 2, 2, 2, 5, 6], [1, 2, 5, 5, 5, 6, 7]])
    start, stop = Intervals.chunks(np.arange(5), 3, up_to_itself=True)
    np.testing.assert_array_equal([start[0], stop[0]], [[0, 0, 0, 3, 3], [1, 2, 3, 4, 5]])


@pytest.mark.parametrize(
    ("window", "causal", "want"),
    [
        (7, True, 7),
        ((6, 3), True, 7),
        ((6, 6), False, 7),
        ((None, 3), True, None),
        ((2**31, 2**31), False, None),
        ((6, 3), False, (6, 3)),
        ((6, None), False, (6, None)),
        (2**31, False, None),
    ],
)
def test_windows_have_two_sides_only_where_they_differ(window, causal, want):
    assert bounded(window, causal) == want


@pytest.mark.parametrize("packed", [False, True])
def test_pad_adds_tokens_that_nobody_sees(packed):
    tokens = Tokens(jnp.arange(5)[None], jnp.zeros((1, 5), jnp.int32) if packed else None)
    queries, keys = tokens.pad(3), tokens.pad(2)
    seen = _seen(MaskSpec(scale=1.0, causal=False), queries, keys)
    assert seen.shape == (8, 7)
    np.testing.assert_array_equal(seen, np.pad(np.ones((5, 5), bool), ((0, 3), (0, 2))))


def test_mask_spec_drawing_is_what_visible_shows():
    lines = inspect.getdoc(MaskSpec).splitlines()
    first = next(number for number, line in enumerate(lines) if "min_distance=2" in line)
    shown = {
        "causal": dict(causal=True),
        "window=2": dict(window=2),
        "min_distance=2": dict(min_distance=2),
        "seq_len=3": dict(seq_len=3),
    }
    assert lines[first].split() == list(shown)
    rows = [[int(number) for number in line.split()] for line in lines[first + 1 : first + 6]]
    drawn = np.array(rows).reshape(5, len(shown), 5).swapaxes(0, 1)
    positions = np.arange(5)
    for matrix, fields in zip(drawn, shown.values(), strict=True):
        mask = MaskSpec(scale=1.0, **(dict(causal=False) | fields))
        np.testing.assert_array_equal(matrix, visible(mask, Tokens(positions[:, None]), Tokens(positions[None])))
