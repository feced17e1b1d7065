import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention.attention.masks import EMPTY, FULL, PARTIAL, Hop, Tokens, tile_kinds, visible


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), causal=st.booleans(), packed=st.booleans(), ordered=st.booleans())
def test_a_tile_called_empty_hides_all_and_one_called_full_hides_nothing(seed, causal, packed, ordered):
    rng = np.random.default_rng(seed)
    arrange = np.sort if ordered else np.asarray

    def side(tokens):
        segments = arrange(rng.integers(0, 3, (1, tokens))) if packed else None
        return Tokens(jnp.asarray(arrange(rng.integers(0, 40, (1, tokens)))), segments)

    hop = Hop(side(24), side(30), causal)
    seen = visible(hop)
    seen = np.ones((1, 24, 30), bool) if seen is None else np.asarray(seen)
    tiles = seen.reshape(1, 4, 6, 6, 5).transpose(0, 1, 3, 2, 4).reshape(1, 4, 6, -1)
    kinds = np.asarray(tile_kinds(Hop(hop.queries.tiles(1, 6), hop.keys.tiles(1, 5), causal)))
    assert not tiles[kinds == EMPTY].any()
    assert tiles[kinds == FULL].all()


def test_the_tiles_of_a_causal_square_are_full_below_the_diagonal_and_empty_above():
    tokens = Tokens(jnp.arange(12)[None]).tiles(1, 4)
    kinds = np.asarray(tile_kinds(Hop(tokens, tokens, True)))[0]
    np.testing.assert_array_equal(kinds, [[PARTIAL, EMPTY, EMPTY], [FULL, PARTIAL, EMPTY], [FULL, FULL, PARTIAL]])


def test_tiles_of_different_documents_are_empty():
    segments = jnp.array([[1] * 8 + [2] * 4])
    tokens = Tokens(jnp.arange(12)[None], segments).tiles(1, 4)
    kinds = np.asarray(tile_kinds(Hop(tokens, tokens, False)))[0]
    np.testing.assert_array_equal(kinds, [[FULL, FULL, EMPTY], [FULL, FULL, EMPTY], [EMPTY, EMPTY, FULL]])
