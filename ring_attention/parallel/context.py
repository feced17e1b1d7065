"""Attention over a sequence that several devices hold, by any strategy: the front for global arrays.

Here arguments are checked and global arrays cut into shards; `shard` has the front for the slices of one device.
"""

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.derivatives import only_reverse_mode
from ring_attention.attention.device_kind import kind_of_mesh
from ring_attention.attention.kernels import find_kernel, require_platform
from ring_attention.attention.mask_args import MASK_DEFAULTS, MaskArgs, defaults_of, lists_arguments, refuse_unknown
from ring_attention.attention.mask_spec import make_mask_spec
from ring_attention.checks import (
    require_attention_dtypes,
    require_attention_shapes,
)
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.kernel_choice import choose_context
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import find_mesh
from ring_attention.parallel.on_mesh import on_mesh
from ring_attention.parallel.ring import Ring
from ring_attention.parallel.shard import (
    MaskAndOptions,
    arrays_of_shard,
    mask_and_options,
)
from ring_attention.parallel.sides import OF_KEYS, OF_QUERIES, Sides, find_sides, padded, real_tokens
from ring_attention.parallel.specs import axes_of_spec, check_spec, default_spec, known_spec, spec_on
from ring_attention.parallel.strategies import StrategyOptions, find_strategy
from ring_attention.parallel.strategy import Context, Strategy

_ARRAYS = (*OF_QUERIES, *OF_KEYS, "kv_lengths", "sinks", "alibi_slopes", "dropout_key", "scale")
"""Arguments of the mask that are arrays, but for a scale that is a number; in the order in which programs take them."""


class SequenceArgs(MaskArgs, total=False):
    """Keyword arguments of `ring_attention`, but for the mesh and its options."""

    axis_name: str
    spec: PartitionSpec | None
    layout: str | SequenceLayout | DealtRows
    positions: jax.Array | None
    kv_layout: str | SequenceLayout | DealtRows | None
    kv_positions: jax.Array | None
    kv_segment_ids: jax.Array | None
    max_segment_len: int | None
    impl: str
    block_sizes: BlockSizes | None
    return_lse: bool


class ContextArgs(SequenceArgs, StrategyOptions, total=False):
    """Keyword arguments of `context_attention`, but for the mesh."""

    strategy: str | Strategy


@lists_arguments(MASK_DEFAULTS)
def context_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    strategy: str | Strategy = "ring",
    axis_name: str = "sp",
    spec: PartitionSpec | None = None,
    layout: str | SequenceLayout | DealtRows = "contiguous",
    positions: jax.Array | None = None,
    kv_layout: str | SequenceLayout | DealtRows | None = None,
    kv_positions: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    max_segment_len: int | None = None,
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
    return_lse: bool = False,
    **arguments: Unpack[MaskAndOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention over a sequence sharded across the devices of `mesh`, by any strategy.

    Which query (row) sees which key (column), in the natural order, T = 5:

        causal=True      window=2         causal=False     segment_ids
                                          window=2         [0,0,0,1,1]
        1 0 0 0 0        1 0 0 0 0        1 1 0 0 0        1 0 0 0 0
        1 1 0 0 0        1 1 0 0 0        1 1 1 0 0        1 1 0 0 0
        1 1 1 0 0        0 1 1 0 0        0 1 1 1 0        1 1 1 0 0
        1 1 1 1 0        0 0 1 1 0        0 0 1 1 1        0 0 0 1 0
        1 1 1 1 1        0 0 0 1 1        0 0 0 1 1        0 0 0 1 1

    Args:
      q: [B,T,H,D], in the layout's order (`SequenceLayout.permute`); float32, bfloat16 or float16. Where the devices do
        not divide T, the arrays are padded inside, which moves all of them: pad in your loader to spare that.
      k: [B,S,K,D] in the dtype of q; K divides H, each key/value head serving H/K query heads. S is T, or, in
        cross-attention, the length of another sequence.
      v: [B,S,K,D_v]; D_v may differ from D. As in dense attention, hidden keys and values must be finite, too: 0 times
        NaN is NaN. What is not reaches all queries that see it and may reach others of the same sequence and head, by
        layout and tiles.
      mesh: the devices; `axis_name` is one of its axes. Axes may be Auto, Explicit or, of a `shard_map` around the
        call, Manual; an AbstractMesh does for `eval_shape` and for compiling ahead of time. By default the mesh that
        `jax.set_mesh` set.
      strategy: how queries and keys of other devices come together: a name from `STRATEGIES`, or one of its values with
        other options. Most are exact; `STRATEGIES[name].exact` says so.
      axis_name: the mesh axis that T is sharded over.
      spec: PartitionSpec of q, of k and of v. By default B and heads over the axes that shard those of q already, where
        that is known (Explicit types and concrete arrays tell it, Auto axes inside `jit` do not), and over those of dp
        and fsdp, and of tp, that the mesh has. Needed where other axes of the mesh would be left.
      layout: "contiguous", "zigzag", "striped", a SequenceLayout, or DealtRows. Zigzag and striped share the work of a
        causal mask out evenly; DealtRows (`SequenceLayout.for_documents`) that of packed documents, by arrays, so that
        one program serves all batches.
      positions: integers [T] or [B,T], nearer to 0 than 2**30, where each token stands for the mask, ALiBi and dropout,
        in place of a layout's. They travel with the keys.
      kv_layout: the layout of keys that are another sequence, by default that of the queries. The positions of both
        then travel as arrays: not with a kernel that must know them when it is traced, which is left or refused.
      kv_positions: integers [S] or [B,S], likewise; by default 0, 1, 2, ... in the natural order of the keys.
      kv_segment_ids: integers [B,S] in the order of the keys; needed with segment_ids where S is not T.
      causal: a token sees itself and those before it in the natural order; otherwise all of them.
      window: a token sees itself and the window-1 tokens before it, and after it where causal is False; or
        (left, right), which is so many before and after it, None for all of them. A ring sends keys no farther than the
        wider side reaches: if it fits in a shard, one hop in contiguous and zigzag layouts.
      segment_ids: integers [B,T] in the layout's order; a token sees its own segment only.
      intervals: `ra.Intervals` or (start, stop), integers [B,T] or [1,T] in the layout's order: the natural positions,
        from `start` to before `stop`, that each token sees, beside what `causal` and `window` show, or, where causal is
        False, of what these show. A ring then goes as far as some token sees, not as far as a window reaches.
      kv_valid: bool [B,S] in the order of the keys, False for keys that nobody sees, such as padding.
      kv_lengths: integers [B]; keys at natural positions from here on are not seen.
      kv_bias: floats [B,S] in the order of the keys, added to a key's scores; -inf hides it. Constants: no gradient
        flows to them.
      max_segment_len: no segment is longer than this, so that keys need not be sent farther. It acts like a window: in
        a segment that is longer after all, tokens this far apart do not see each other.
      softcap: scores x become softcap * tanh(x / softcap).
      scale: of the products of queries and keys; D**-0.5 by default. A number, or a floating array [] that is traced,
        to which a gradient flows.
      sinks: [H], a logit for each head that takes part in the softmax but has no value; can be differentiated.
      alibi_slopes: [H]; a score falls by the slope for each position of distance. Constants: no gradient flows to them.
      dropout_rate: of weights. Which ones are dropped depends on the key and their global batch row, head and positions
        alone: the same on any mesh and in any layout.
      dropout_key: a `jax.random` key, needed with dropout; inside a `shard_map` over other axes, one for each device
        along these.
      extra_mask: a `Mask`, a further condition on positions; a query sees the keys that it shows, too.
      impl: name of the kernel that computes tiles, or "auto": the fastest that can do this on these devices, where it
        passed its self-test (docs/kernels.md). A name never gives way to another kernel.
      block_sizes: sizes of the kernel's tiles; chosen for the kernel and the device by default.
      return_lse: also return the lse.
      **options: of the strategy, for example `duplex=True` for "ring" or `ulysses_size=4` for "usp"; its class in
        `STRATEGIES` describes them.

    Returns:
      [B,T,H,D_v] in the dtype of q and sharded as `spec` says; 0 where a query sees no key. Where q's type, or the mesh
      set, has Explicit axes, so has the result's; an axis that the devices do not divide is whole there. With
      `return_lse` also the natural logarithm of the sum of exponentials over all keys, float32 [B,T,H], sharded
      likewise, -inf where a query sees no key. Both can be differentiated.

    Raises:
      ValueError: for shapes, dtypes, values, names or meshes that do not fit, before anything compiles.
    """
    require_attention_shapes(q, k, v)
    require_attention_dtypes(q, k, v)
    given, mesh = mesh, find_mesh(mesh, axis_name)
    P, of_keys = mesh.shape[axis_name], (kv_layout, kv_positions, kv_segment_ids)
    sides, *places = find_sides(q.shape, k.shape, P, layout, positions, of_keys)
    kind = kind_of_mesh(mesh)
    require_platform(find_kernel(impl), kind.platform)
    spec = _found_spec(spec, given, mesh, axis_name, q, k)
    mask, options = mask_and_options(arguments, q.shape, k.shape, sides, kv_segment_ids, max_segment_len, "BTS")
    strategy = find_strategy(strategy, options, context_attention)
    T, sizes = q.shape[1], [math.prod(mesh.shape[axis] for axis in axes) for axes in axes_of_spec(spec)]
    whole = sides.queries.padded_length(T)
    context = choose_context(
        strategy,
        impl,
        block_sizes,
        axis_name=axis_name,
        layout=sides.together,
        kind=kind,
        shape=(q.shape[0] // sizes[0], whole // P, q.shape[2] // sizes[2], max(q.shape[3], v.shape[3])),
        return_lse=return_lse,
        dtype=q.dtype,
        kv_heads=k.shape[2] // sizes[2],
        make_mask=functools.partial(make_mask_spec, q, **mask, seq_len=None if whole == T or sides.cross else T),
    )
    arrays = _taken_arrays(mask, places, q.shape[:2])
    with only_reverse_mode():
        out, lse = _sharded(mesh, spec, strategy, context, sides, **mask)(q, k, v, *arrays)
    return (out, lse) if return_lse else out


def _found_spec(spec: PartitionSpec | None, given, mesh: Mesh | AbstractMesh, axis_name: str, q, k) -> PartitionSpec:
    """The spec of q, for the mesh that was found where `given` was asked for; raises ValueError where it cannot be."""
    if spec is None:
        spec = default_spec(mesh, axis_name, known_spec(q, mesh), sizes=(k.shape[0], k.shape[2]))
    spec = spec_on(spec, given, mesh)
    check_spec(spec, mesh, axis_name, q, k)
    return spec


@lists_arguments(defaults_of(context_attention, but=("strategy",)))
def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    duplex: bool = False,
    unroll: bool = False,
    **arguments: Unpack[SequenceArgs],
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention over a sequence sharded across the devices of `mesh`: `context_attention` by ring.

    Keys and values travel around the ring, each device attending to those at hand while the next ones are on their way
    (Liu, Zaharia & Abbeel 2023). Memory per device depends on its shard, not on the length of the sequence.

    Args:
      q: [B,T,H,D], in the layout's order.
      k: [B,T,K,D].
      v: [B,T,K,D_v].
      mesh: the devices, by default those of `jax.set_mesh`.
      duplex: send the second half of each shard the other way round, for links that carry both directions at once.
      unroll: write the steps of the ring out instead of looping over them (docs/structure.md compares the programs).
      others: as in `context_attention`.

    Returns:
      [B,T,H,D_v] in the dtype of q and sharded like it; 0 where a query sees no key. With `return_lse` also the lse,
      float32 [B,T,H].

    Raises:
      ValueError: for shapes, dtypes, values, names or meshes that do not fit, before anything compiles.
    """
    refuse_unknown(ring_attention, arguments)
    return context_attention(q, k, v, mesh=mesh, strategy=Ring(duplex=duplex, unroll=unroll), **arguments)


@functools.lru_cache(maxsize=128)
def _sharded(
    mesh: Mesh | AbstractMesh, spec: PartitionSpec, strategy: Strategy, context: Context, sides: Sides, **mask
):
    """An attention over global arrays, compiled once for each set of choices; arrays of the mask are in `_ARRAYS`."""
    batch_axes, _, head_axes, _ = axes_of_spec(spec)

    def run(shard_map, q, k, v, *arrays):
        (B, T, *_), S = q.shape, k.shape[1]
        real = real_tokens(sides.queries, T)

        @jax.named_scope("attention")
        def on_shards(q, k, v, *arrays):
            offsets = dict(
                batch_offset=_shard_number(batch_axes) * q.shape[0],
                head_offset=_shard_number(head_axes) * q.shape[2],
                seq_len=None if real is None or sides.cross else T,
            )
            here = dict(zip(_ARRAYS, arrays, strict=True)) | mask
            intervals = here.pop("starts"), here.pop("stops")
            here["intervals"] = None if intervals[0] is None else intervals
            places = here.pop("positions"), here.pop("kv_positions")
            arrays = arrays_of_shard(strategy, context, q, k, v, here, places, **offsets)
            return tuple(jnp.swapaxes(x, 1, 2) for x in strategy.attend(context, *arrays))

        rows, heads = PartitionSpec(spec[0]), PartitionSpec(head_axes or None)
        of_tokens = [PartitionSpec(*spec[:2])] * len((*OF_QUERIES, *OF_KEYS))
        in_specs = (spec, spec, spec, *of_tokens, rows, heads, heads, PartitionSpec(), PartitionSpec())
        sharded = shard_map(on_shards, in_specs, (spec, PartitionSpec(*spec[:3])))
        named = sides.placed(dict(zip(_ARRAYS, arrays, strict=True)), B, T, S)
        named |= {name: padded(sides.queries, named[name], T) for name in OF_QUERIES}
        named |= {name: padded(sides.keys, named[name], S) for name in OF_KEYS}
        q, k, v = padded(sides.queries, q, T), padded(sides.keys, k, S), padded(sides.keys, v, S)
        results = sharded(q, k, v, *named.values())
        return results if real is None else tuple(x[:, real] for x in results)

    return on_mesh(mesh, spec, run)


def _taken_arrays(mask: dict[str, Any], places, shape: tuple[int, ...]) -> list:
    """The arguments in `_ARRAYS`, all others of `mask` being left in it; intervals [1,T] as [B,T]."""
    (mask["positions"], mask["kv_positions"]), intervals = places, mask.pop("intervals")
    for number, name in enumerate(("starts", "stops")):
        mask[name] = None if intervals is None else jnp.broadcast_to(intervals[number], shape)
    return [None if isinstance(mask[name], float) else mask.pop(name) for name in _ARRAYS]


def _shard_number(axes: tuple[str, ...]):
    """Which of the shards along these mesh axes this device holds."""
    return lax.axis_index(axes) if axes else 0
