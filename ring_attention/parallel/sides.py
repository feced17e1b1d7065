"""Where queries and keys stand: of one sequence, or, in cross-attention, of two that the same devices hold.

Two sequences have lengths and layouts of their own, so a device's number does not tell which of its queries meets which
key. Their positions are arrays then, and those of the keys travel with them, as in layouts that are data.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.token_args import require_positions
from ring_attention.checks import require
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.layouts import SequenceLayout, as_layout

OF_QUERIES = ("positions", "segment_ids", "starts", "stops")
"""Arguments that are arrays [B,T] of the queries; "starts" and "stops" are those of intervals."""

OF_KEYS = ("kv_positions", "kv_segment_ids", "kv_valid", "kv_bias")
"""Arguments that are arrays [B,S] of the keys."""


@dataclasses.dataclass(frozen=True)
class Sides:
    """The layouts of queries and keys.

    Attributes:
      queries, keys: layouts.
      cross: whether they are two sequences.
    """

    queries: SequenceLayout
    keys: SequenceLayout
    cross: bool

    @property
    def together(self) -> SequenceLayout:
        """The layout by which a strategy brings them together."""
        return SequenceLayout("given", self.queries.ring_size) if self.cross else self.queries

    def placed(self, named: dict[str, Any], batch: int, T: int, S: int) -> dict[str, Any]:
        """The arrays of OF_QUERIES and OF_KEYS with those that two sequences need, of the tokens before any padding."""
        if not self.cross:
            return named
        named = dict(named)
        for name, layout, length in (("positions", self.queries, T), ("kv_positions", self.keys, S)):
            if named[name] is None:
                places = layout.positions(layout.padded_length(length))
                named[name] = jnp.broadcast_to(jnp.asarray(places[places < length], jnp.int32), (batch, length))
        if named["kv_valid"] is None and real_tokens(self.keys, S) is not None:
            named["kv_valid"] = jnp.ones((batch, S), bool)
        return named


def real_tokens(layout: SequenceLayout, length: int) -> np.ndarray | None:
    """The places of so many tokens among those that a layout pads them to; None where it does not.

    Padding comes last in the natural order; in the layout's it may stand anywhere.
    """
    padded = layout.padded_length(length)
    return None if padded == length else np.flatnonzero(layout.positions(padded) < length)


def padded(layout: SequenceLayout, x: jax.Array | None, length: int) -> jax.Array | None:
    """An array [B,length,...] with zeros where the layout has padding: keys that nobody says are real are not."""
    real = real_tokens(layout, length)
    if x is None or real is None:
        return x
    return jnp.zeros((x.shape[0], layout.padded_length(length), *x.shape[2:]), x.dtype).at[:, real].set(x)


def find_sides(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    ring_size: int,
    layout,
    positions,
    of_keys: tuple,
    *,
    shard: Callable | None = None,
) -> tuple[Sides, jax.Array | None, jax.Array | None]:
    """The sides, and positions int32 [B,T] of queries and [B,S] of keys, None where layouts tell them.

    Args:
      q_shape, k_shape: [B,T,H,D] and [B,S,K,D], of the whole arrays or of a device's slices.
      ring_size: devices that share a sequence.
      layout, positions: as the public functions take them.
      of_keys: kv_layout, kv_positions and kv_segment_ids, likewise.
      shard: gives the number of the shard whose slices these are; None for whole arrays.

    Raises:
      ValueError: for what does not fit the devices and the tokens, or both positions and a layout.
    """
    kv_layout, kv_positions, _ = of_keys
    cross = q_shape[1] != k_shape[1] or any(x is not None for x in of_keys)
    asked = ("positions", layout, positions, q_shape), ("kv_positions", kv_layout, kv_positions, k_shape)
    found = []
    for name, own, given, shape in asked if cross else asked[:1]:
        if name == "kv_positions" and own is None:
            own = "contiguous" if given is not None else layout
        own, given = _layout_and_positions(name, own, given, ring_size, shape[:2], shard)
        length = shape[1] if shard is None else shape[1] * ring_size
        own.check_length(own.padded_length(length) if given is None and shard is None else length)
        if cross and shard is not None and given is None:
            given = jnp.broadcast_to(own.shard_positions(shard(), shape[1]), shape[:2])
        found.append((own, given))
    (queries, positions), (keys, kv_positions) = found[0], found[-1]
    return Sides(queries, keys, cross), positions, kv_positions if cross else None


def _layout_and_positions(
    name: str, layout, positions, ring_size: int, shape: tuple[int, ...], shard: Callable | None
) -> tuple[SequenceLayout, jax.Array | None]:
    """The layout, and positions int32 [B,T] or None where it tells them.

    Args:
      name: of the argument that gives positions.
      layout, positions: as the public functions take them.
      ring_size: devices that share a sequence.
      shape: that of the tokens, (B, T).
      shard: gives the number of the shard whose positions are wanted; None for those of all shards.

    Raises:
      ValueError: for what does not fit the devices and the tokens, or both positions and a layout.
    """
    B, T = shape
    if isinstance(layout, DealtRows):
        require(positions is None, f"{name} and DealtRows both say where tokens stand; give one of them")
        layout.check(B, T if shard is None else T * ring_size)
        fits = layout.ring_size == ring_size
        remedy = f"make it by SequenceLayout.for_documents(segment_ids, {ring_size})"
        require(fits, f"layout deals to {layout.ring_size} devices, but there are {ring_size}; {remedy}")
        positions = layout.positions(T) if shard is None else layout.shard_positions(shard(), T)
        given = SequenceLayout("given", ring_size, given_chunks=layout.chunks_per_shard)
        return given, jnp.asarray(positions, jnp.int32)
    layout = as_layout(layout, ring_size)
    if positions is None:
        require(layout.kind != "given", f'layout="given" has no {name}; give {name}=, or leave the layout out')
        return layout, None
    remedy = "leave the layout out, or give each position in its place of the layout's order"
    require(layout.kind in ("contiguous", "given"), f"{name} are given beside layout={layout.kind!r}; {remedy}")
    require_positions(name, positions, B, T)
    positions = jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (B, T))
    return layout if layout.kind == "given" else SequenceLayout("given", ring_size), positions
