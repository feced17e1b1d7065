"""Attention of the newest tokens to a cache of keys and values that is sharded over the sequence.

The cache stays where it is. Each device attends to the slots that it holds, and what it makes of them, an output and
its lse for each query and head, goes to all others in one small gather: everybody then merges the same numbers.
"""

import functools
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ring_attention.attention import online_softmax
from ring_attention.attention import sinks as attention_sinks
from ring_attention.attention.blocks import BlockSizes, as_blocks
from ring_attention.attention.cached import Cache, attend_cached
from ring_attention.attention.derivatives import only_reverse_mode
from ring_attention.attention.device_kind import DeviceKind, kind_here, kind_of_mesh
from ring_attention.attention.kernels import find_kernel
from ring_attention.attention.kernels.tile_sizes import slots_of
from ring_attention.attention.mask_args import MASK_DEFAULTS, ScoreArgs, lists_arguments, refuse_unknown
from ring_attention.attention.mask_spec import as_sinks, checked_mask_args, make_mask_spec
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.token_args import FARTHEST
from ring_attention.checks import (
    require,
    require_array,
    require_attention_dtypes,
    require_attention_shapes,
    require_integers,
    require_same_head_dim,
    shown,
)
from ring_attention.parallel.layouts import SequenceLayout, as_layout
from ring_attention.parallel.mesh import find_mesh
from ring_attention.parallel.on_mesh import on_mesh
from ring_attention.parallel.specs import axes_of_spec, check_spec, default_spec, known_spec, spec_on


@lists_arguments(MASK_DEFAULTS)
def decode_attention_shard(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    lengths: jax.Array,
    axis_name: str = "sp",
    layer: jax.Array | None = None,
    heads_first: bool = False,
    slot_positions: jax.Array | None = None,
    layout: str | SequenceLayout = "striped",
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
    **arguments: Unpack[ScoreArgs],
) -> jax.Array:
    """`decode_attention` for use inside your own `shard_map`.

    Args:
      q: [B,T,H,D], the same on all devices of the axis: this device's rows and heads.
      k_cache: this device's slots [B,s,K,D], in the dtype of q or, half precision, `attention.cached.as_bits` of it.
      v_cache: [B,s,K,D].
      lengths: int32 [B], of this device's rows.
      axis_name: the axis that the cache is sharded over.
      slot_positions: int32 [B,s], the positions of the tokens that this device's slots hold, -1 where they hold none;
        those of the layout by default. A cache that is written in a circle holds a row's newest tokens alone, and then
        lengths may be more than its slots.
      layer: int32; the caches are then those of all layers, with an axis L before, and this one is read where it lies.
      others: as in `decode_attention`; sinks and alibi_slopes [H] are those of this device's heads.

    Returns:
      [B,T,H,D] in the dtype of q, the same on all devices of the axis.

    Raises:
      ValueError: for shapes, dtypes, values or names that do not fit, before anything compiles.
    """
    refuse_unknown(decode_attention_shard, arguments)
    layout = as_layout(layout, lax.axis_size(axis_name))
    cache = Cache(k_cache, v_cache, layer, heads_first)
    k_shape, v_shape = (_global_shape(x, q, cache, layout.ring_size) for x in (k_cache, v_cache))
    _check(q, k_shape, v_shape, lengths, layout, impl, circle=slot_positions is not None)
    mask, size = checked_mask_args(arguments, q.shape[2]), tile_size(block_sizes, kind_here(q), q, cache)
    if slot_positions is None:
        slot_positions = layout.shard_positions(lax.axis_index(axis_name), cache.slots)[None]
    else:
        require_integers("slot_positions", slot_positions, (q.shape[0], cache.slots), "Bs")
    return attend_to_parts(q, [(cache, slot_positions)], _newest(lengths, q), axis_name=axis_name, size=size, mask=mask)


def _newest(lengths: jax.Array, q: jax.Array) -> jax.Array:
    """int32 [B,T], the positions of queries that are the newest tokens of rows of these lengths."""
    T = q.shape[1]
    return lengths.astype(jnp.int32)[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None]


def attend_to_parts(
    q: jax.Array,
    parts: list[tuple[Cache, jax.Array]],
    q_positions: jax.Array,
    *,
    axis_name: str,
    size: int,
    mask: dict,
) -> jax.Array:
    """Attention to the slots of all devices, of arguments that were checked; `size` slots are read at once.

    A part is a cache and the positions of its slots, int32 [B or 1, s], -1 where a slot holds nothing.
    """
    spec, states = make_mask_spec(q, **mask), []
    for cache, positions in parts:
        positions = jnp.where(positions < 0, FARTHEST, positions)
        states.append(attend_cached(q, cache, mask=spec, q_positions=q_positions, kv_positions=positions, size=size))
    state = functools.reduce(lambda x, y: online_softmax.merge(x, *online_softmax.finalize(y)), states)
    out, _ = attention_sinks.finalize(_merged(state, axis_name), as_sinks(mask["sinks"]))
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def _global_shape(x: jax.Array, q: jax.Array, cache: Cache, devices: int) -> jax.ShapeDtypeStruct:
    """Shape [B,S,K,D] and dtype of what `x`, keys or values of a cache, is one device's part of."""
    for name, array in (("q", q), ("the cache", x)):
        require_array(name, array)
    shape = list(x.shape if cache.layer is None else x.shape[1:])
    if cache.heads_first and len(shape) == 4:
        shape[1:3] = reversed(shape[1:3])
    global_shapes = tuple(size * (devices if axis == 1 else 1) for axis, size in enumerate(shape))
    are_bits = x.dtype == jnp.uint16 and q.dtype.itemsize == 2
    return jax.ShapeDtypeStruct(global_shapes, q.dtype if are_bits else x.dtype)


def _merged(state: SoftmaxState, axis_name: str) -> SoftmaxState:
    """Statistics over the slots of all devices of the axis."""
    out, lse = online_softmax.finalize(state)
    packed = jnp.concatenate([out, lse[..., None]], axis=-1)
    everyone = lax.all_gather(packed, axis_name, to="invarying")  # [P,B,H,T,D+1]
    out, lse = everyone[..., :-1], everyone[..., -1]
    top = lse.max(0)
    weight = jnp.exp(lse - online_softmax.finite(top)[None])
    return SoftmaxState((out * weight[..., None]).sum(0), top, weight.sum(0))


@lists_arguments(MASK_DEFAULTS)
def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    lengths: jax.Array,
    axis_name: str = "sp",
    spec: PartitionSpec | None = None,
    heads_first: bool = False,
    layout: str | SequenceLayout = "striped",
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
    **arguments: Unpack[ScoreArgs],
) -> jax.Array:
    """Attention of each row's newest tokens to its cache, which the devices of `mesh` hold shards of.

    A row sees the slots of its own tokens, at positions 0 to lengths-1, causally. Each device attends to the slots that
    it holds, then one all-gather of float32 [B,T,H,D+1] brings the parts together; the cache does not move.
    With "striped", position p lies on device p % P in slot p // P, whatever the capacity, so that rows grow evenly over
    the devices and what was prefilled is the beginning of a larger cache.

    Args:
      q: [B,T,H,D], the T newest tokens of each row, one in plain decoding; float32, bfloat16 or float16.
      k_cache: [B,S,K,D] in the dtype of q, S slots in the layout's order; K divides H. The T newest tokens are in it.
        Slots at positions from a row's length on are not seen, but must hold finite numbers.
      v_cache: [B,S,K,D].
      mesh: the devices; `axis_name` is one of its axes. Of any types of axes, and by default the one set, as in
        `context_attention`.
      lengths: integers [B], tokens of each row that are in the cache, 0 to S. Queries before a row's first token, as
        there are where it holds fewer than T, see nothing.
      axis_name: the mesh axis that S is sharded over.
      spec: PartitionSpec of caches [B,S,K,D]; q and the result have the same but whole tokens. By default as in
        `context_attention`, by the sharding of k_cache.
      heads_first: the caches are [B,K,S,D]. Keep them so on GPUs, whose compiler otherwise puts heads first by copying
        all of them in every call.
      layout: the order of the slots, "striped", "contiguous", "zigzag" or a SequenceLayout.
      window: a token sees itself and the window-1 tokens before it.
      softcap, scale: as in `context_attention`.
      sinks: [H], a logit for each head that takes part in the softmax but has no value; counted once.
      alibi_slopes: [H]; a score falls by the slope for each position of distance.
      extra_mask: a `Mask`, a condition on positions beside the window.
      impl: "auto" or "xla"; the kernels for training have no form for a few queries.
      block_sizes: of which `kv`, slots that are read at once, counts; chosen for the device by default.

    Returns:
      [B,T,H,D] in the dtype of q and sharded over batch and heads like it; 0 where a query sees no key.

    Raises:
      ValueError: for shapes, dtypes, values, names or meshes that do not fit, before anything compiles.
    """
    refuse_unknown(decode_attention, arguments)
    given, mesh = mesh, find_mesh(mesh, axis_name)
    layout = as_layout(layout, mesh.shape[axis_name])
    need = "must be True (caches are [B,K,S,D]) or False ([B,S,K,D]); leave it out for False"
    require(isinstance(heads_first, bool), f"heads_first={shown(heads_first)} {need}")
    cache = Cache(k_cache, v_cache, None, heads_first)
    k_shape, v_shape = (_global_shape(x, q, cache, 1) for x in (k_cache, v_cache))
    _check(q, k_shape, v_shape, lengths, layout, impl)
    if spec is None:
        known = _known_spec(k_cache, mesh, heads_first)
        spec = default_spec(mesh, axis_name, known, sizes=(q.shape[0], k_shape.shape[2]))
    spec = spec_on(spec, given, mesh)
    check_spec(spec, mesh, axis_name, q, k_shape)
    mask = checked_mask_args(arguments, q.shape[2])
    sinks, alibi_slopes = mask.pop("sinks"), mask.pop("alibi_slopes")
    settings = dict(axis_name=axis_name, layout=layout, size=tile_size(block_sizes, kind_of_mesh(mesh), q, cache))
    with only_reverse_mode():
        return _sharded(mesh, spec, heads_first, **settings, **mask)(q, k_cache, v_cache, lengths, sinks, alibi_slopes)


@functools.lru_cache(maxsize=128)
def _sharded(
    mesh: Mesh | AbstractMesh,
    spec: PartitionSpec,
    heads_first: bool,
    *,
    axis_name: str,
    layout: SequenceLayout,
    size: int,
    **mask,
):
    """Attention to a global cache, compiled once for each set of choices."""
    batch_axes, slot_axes, head_axes, _ = axes_of_spec(spec)
    batch, heads = batch_axes or None, head_axes or None
    queries = PartitionSpec(batch, None, heads)
    cache = PartitionSpec(batch, heads, slot_axes) if heads_first else spec

    def run(shard_map, *arrays):
        def on_shards(q, k_cache, v_cache, lengths, sinks, alibi_slopes):
            here = mask | dict(sinks=sinks, alibi_slopes=alibi_slopes)
            slots = Cache(k_cache, v_cache, None, heads_first)
            parts = [(slots, layout.shard_positions(lax.axis_index(axis_name), slots.slots)[None])]
            return attend_to_parts(q, parts, _newest(lengths, q), axis_name=axis_name, size=size, mask=here)

        of_heads = PartitionSpec(heads)
        in_specs = (queries, cache, cache, PartitionSpec(batch), of_heads, of_heads)
        return shard_map(on_shards, in_specs, queries)(*arrays)

    return on_mesh(mesh, queries, run)


def _known_spec(cache, mesh: Mesh | AbstractMesh, heads_first: bool) -> PartitionSpec | None:
    """How a cache is sharded, as a spec of [B,S,K,D], where that is known now."""
    known = known_spec(cache, mesh)
    if known is None or not heads_first:
        return known
    batch, heads, slots, features = [*known, None, None, None, None][:4]
    return PartitionSpec(batch, slots, heads, features)


def tile_size(block_sizes: BlockSizes | None, kind: DeviceKind, q: jax.Array, cache: Cache) -> int:
    """How many slots are read at once."""
    slots = slots_of(kind, q.shape[3], q.shape[2] // cache.num_kv_heads)
    return as_blocks(block_sizes, BlockSizes(kv=slots)).kv


def _check(q, k_cache, v_cache, lengths, layout: SequenceLayout, impl: str, *, circle: bool = False) -> None:
    """Raise ValueError unless shapes and dtypes fit each other, and the caches of a device the layout."""
    require_attention_shapes(q, k_cache, v_cache)
    require_attention_dtypes(q, k_cache, v_cache)
    require_same_head_dim("a cache", k_cache, v_cache)
    (B, T, *_), S = q.shape, k_cache.shape[1]
    layout.check_length(S)
    require(T <= S, f"q holds T={T} new tokens, the cache has S={S} slots; give the tokens that are in the cache")
    require_integers("lengths", lengths, (B,), "B", least=0, most=2**31 - 1 if circle else S)
    kernel = find_kernel(impl).name
    require(kernel == "xla", f'impl={impl!r} computes whole shards, not a few queries; use impl="auto"')
