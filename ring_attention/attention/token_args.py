"""What callers say of each token, checked, and made into the `Tokens` of a block pair."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ring_attention.attention.masks import Runs, Tokens
from ring_attention.checks import require, require_array, require_integers, require_shape, shown

FARTHEST = 2**30
"""Positions lie closer to 0 than this, so that the distance of two fits 32 bits."""


def check_positions(side: str, positions, segments, batch: int, length: int) -> None:
    """Raise ValueError unless positions are integers [length] or [1 or B, length], and segments [B, length]."""
    if positions is not None:
        require_positions(f"{side}_positions", positions, batch, length)
    if segments is not None:
        require_integers(f"segment ids of {side}", segments, (batch, length), "BT")


def require_positions(name: str, positions, batch: int, length: int) -> None:
    """Raise ValueError unless positions are integers [length] or [1 or batch, length], near enough to 0."""
    ndim = getattr(positions, "ndim", 1)
    shape = (length,) if ndim < 2 else (None if positions.shape[0] == 1 else batch, length)
    letters, most = ("T" if ndim < 2 else "BT"), FARTHEST - 1
    require_integers(name, positions, shape, letters, least=-most, most=most)


def segments_of_keys(segment_ids, kv_segment_ids, queries: int, keys: int):
    """Segments of the keys, those of the queries by default; raises ValueError where one or the other is missing."""
    require(segment_ids is not None or kv_segment_ids is None, "kv_segment_ids needs segment_ids; give both or neither")
    if kv_segment_ids is not None or segment_ids is None:
        return kv_segment_ids
    words = f"segment_ids covers T={queries} queries, but there are S={keys} keys; give kv_segment_ids [B,S] as well"
    require(queries == keys, words)
    return segment_ids


def check_token_args(arguments: Mapping[str, Any], batch: int, queries: int, keys: int, letters: str = "TS") -> None:
    """Raise ValueError for intervals and what is said of keys (`MaskArgs`) unless dtypes and shapes fit.

    `letters` name the axes of the queries and of the keys.
    """
    intervals = arguments.get("intervals")
    if intervals is not None:
        two = isinstance(intervals, tuple | list) and len(intervals) == 2
        need = "need (start, stop), two arrays of integers; make it with ra.Intervals, or give a tuple"
        require(two, f"intervals={shown(intervals)}, {need}")
        for name, x in zip(("start of intervals", "stop of intervals"), intervals, strict=True):
            require_array(name, x)
            require_integers(name, x, (1 if x.shape[:1] == (1,) else batch, queries), "B" + letters[0])
    for name, dtype, need in (
        ("kv_valid", jnp.bool_, "bool; give x.astype(bool), True where a key is real"),
        ("kv_bias", jnp.floating, "floats; cast it to float32"),
    ):
        x = arguments.get(name)
        if x is not None:
            require_array(name, x)
            require_shape(name, x.shape, (batch, keys), "B" + letters[1])
            require(jnp.issubdtype(x.dtype, dtype), f"{name} has dtype {x.dtype}, need {need}")
    if arguments.get("kv_lengths") is not None:
        require_integers("kv_lengths", arguments["kv_lengths"], (batch,), "B")


def runs_of(positions, length: int) -> Runs | None:
    """All tokens in one run where nobody gave their positions."""
    return Runs((length,), 1, ((0,),)) if positions is None else None


def query_tokens(positions, segments, length: int, intervals=None) -> Tokens:
    """Queries with positions int32 [1 or B, length], segments, and intervals [1 or B, length] if there are any."""
    low, high = (None, None) if intervals is None else (jnp.asarray(x).astype(jnp.int32) for x in intervals)
    return Tokens(_positions(positions, length), _int32(segments), runs_of(positions, length), low=low, high=high)


def key_tokens(positions, segments, length: int, arguments: Mapping[str, Any]) -> Tokens:
    """Keys with positions int32 [1 or B, length], segments, and what `arguments` (`MaskArgs`) says of them."""
    known = _positions(positions, length)
    real, bias = keys_of(known, arguments)
    return Tokens(known, _int32(segments), runs_of(positions, length), real=real, bias=bias)


def keys_of(positions, arguments: Mapping[str, Any]) -> tuple[jax.Array | None, jax.Array | None]:
    """(real, bias) of keys at these positions [1 or B, s] by `arguments` (`MaskArgs`); None for what is not said.

    A bias of -inf hides a key, and is then 0.
    """
    valid, lengths, bias = (arguments.get(name) for name in ("kv_valid", "kv_lengths", "kv_bias"))
    real = None if valid is None else jnp.asarray(valid, bool)
    if lengths is not None:
        inside = positions < jnp.asarray(lengths).astype(jnp.int32)[:, None]
        real = inside if real is None else real & inside
    if bias is not None:
        bias = jax.lax.stop_gradient(jnp.asarray(bias, jnp.float32))
        shown_keys = bias > -jnp.inf
        real, bias = shown_keys if real is None else real & shown_keys, jnp.where(shown_keys, bias, 0.0)
    return real, bias


def _positions(positions, length: int) -> jax.Array:
    positions = jnp.arange(length, dtype=jnp.int32) if positions is None else jnp.asarray(positions)
    return (positions[None] if positions.ndim == 1 else positions).astype(jnp.int32)


def _int32(segments) -> jax.Array | None:
    return None if segments is None else jnp.asarray(segments).astype(jnp.int32)
