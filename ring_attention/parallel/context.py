"""Attention over a sequence that several devices hold, by any strategy: the front that all of them share.

Here arguments are checked and global arrays cut into shards; how queries and keys are then brought together is the
strategy's business.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ring_attention.attention.blocks import BlockSizes, as_blocks
from ring_attention.attention.derivatives import only_reverse_mode
from ring_attention.attention.kernels import find_kernel, require_platform
from ring_attention.attention.mask_spec import as_sinks, check_mask_spec, check_window, make_mask_spec, of_heads
from ring_attention.attention.varying import vary_together
from ring_attention.checks import (
    require,
    require_attention_dtypes,
    require_attention_shapes,
    require_integers,
)
from ring_attention.parallel.layouts import SequenceLayout, as_layout
from ring_attention.parallel.mesh import find_mesh, platform_of
from ring_attention.parallel.on_mesh import on_mesh
from ring_attention.parallel.ring import Ring
from ring_attention.parallel.specs import axes_of_spec, check_spec, default_spec, known_spec, spec_on
from ring_attention.parallel.strategies import find_strategy
from ring_attention.parallel.strategy import Context, Strategy


@jax.named_scope("attention")
def context_attention_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    strategy: str | Strategy = "ring",
    axis_name: str = "sp",
    layout: str | SequenceLayout = "contiguous",
    causal: bool = True,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    max_segment_len: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    batch_offset: int | jax.Array = 0,
    head_offset: int | jax.Array = 0,
    seq_len: int | None = None,
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
    **options,
) -> jax.Array:
    """`context_attention` for use inside your own `shard_map`.

    A `vmap` with an axis name works too (not for USP), for rings larger than the machine; take gradients inside it,
    because JAX does not know the name any more when it differentiates from outside.

    Args:
      q: this device's slice [B,t,H,D] of the queries, in the layout's order; float32, bfloat16 or float16.
      k: this device's slice [B,t,K,D] of the keys, in the dtype of q; K divides H.
      v: this device's slice [B,t,K,D] of the values.
      strategy: a name from `STRATEGIES`, or one of its values with other options.
      axis_name: the axis that the sequence is sharded over.
      layout: the order in which tokens were dealt to devices, a name or a SequenceLayout.
      causal, window, max_segment_len, softcap, scale: as in `context_attention`, and so are dropout_rate and
        dropout_key.
      segment_ids: this device's slice, integers [B,t]; a token sees its own segment only.
      sinks: those of this device's heads, [H].
      alibi_slopes: those of this device's heads, [H].
      batch_offset: global index of this device's first sequence, by which dropout counts.
      head_offset: global index of this device's first head, by which dropout counts.
      seq_len: tokens of the whole sequence that are real; those at positions from here on are padding. All by default.
      impl: name of the kernel that computes tiles, or "auto".
      block_sizes: sizes of the kernel's tiles.
      **options: of the strategy.

    Returns:
      This device's slice [B,t,H,D] of the output, in the dtype of q; 0 where a query sees no key.

    Raises:
      ValueError: for shapes, dtypes, values or names that do not fit, before anything compiles.
    """
    require_attention_shapes(q, k, v)
    require_attention_dtypes(q, k, v)
    B, t, H, D = q.shape
    _require_as_many_keys(q, k)
    layout = as_layout(layout, _axis_size(axis_name))
    layout.check_length(t * layout.ring_size)
    if segment_ids is not None:
        require_integers("segment_ids", segment_ids, (B, t), "Bt")
        segment_ids = segment_ids.astype(jnp.int32)
    mask = make_mask_spec(
        q,
        causal=causal,
        window=_shorter(window, max_segment_len, segment_ids),
        softcap=softcap,
        scale=scale,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        batch_offset=batch_offset,
        head_offset=head_offset,
        seq_len=seq_len,
    )
    kernel = find_kernel(impl)
    kernel.check(mask, jax.ShapeDtypeStruct((B, H, t, D), q.dtype))
    context = Context(axis_name=axis_name, layout=layout, kernel=kernel, blocks=as_blocks(block_sizes))
    strategy = find_strategy(strategy, options, context_attention_shard)
    strategy.check(context, (B, t, H, D), k.shape[2], mask)
    arrays = (q, k, v, segment_ids, mask, as_sinks(sinks, H), lax.axis_index(axis_name))
    q, k, v, segment_ids, mask, sinks, _ = vary_together(*arrays)
    out = strategy.attend(context, *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), segment_ids, mask, sinks)
    return jnp.swapaxes(out, 1, 2)


def _require_as_many_keys(q, k) -> None:
    """Raise ValueError for keys of another sequence that is not as long as that of the queries."""
    require(
        k.shape[1] == q.shape[1],
        f"q has T={q.shape[1]} tokens and k has {k.shape[1]}, need as many of each, since devices hold the same share "
        "of both; use blockwise_attention for cross attention, decode_attention for a few queries and a cache",
    )


def _axis_size(axis_name: str) -> int:
    """Devices along an axis of the shard_map, or vmap, that this is called in."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        where = f"axis_name={axis_name!r} has no meaning here, need the name of an axis that jax.shard_map goes over"
        raise ValueError(f"{where}; call it inside a shard_map, or give it whole arrays as context_attention") from None


def _shorter(window: int | None, max_segment_len: int | None, segment_ids) -> int | None:
    """The window that both bounds make."""
    if max_segment_len is None:
        return window
    require(
        segment_ids is not None,
        f"max_segment_len={max_segment_len} bounds segments, but there are none; give segment_ids, or window instead",
    )
    check_window("max_segment_len", max_segment_len)
    check_window("window", window)
    return max_segment_len if window is None else min(window, max_segment_len)


def context_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    strategy: str | Strategy = "ring",
    axis_name: str = "sp",
    spec: PartitionSpec | None = None,
    layout: str | SequenceLayout = "contiguous",
    causal: bool = True,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    max_segment_len: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
    **options,
) -> jax.Array:
    """Attention over a sequence sharded across the devices of `mesh`, by any strategy.

    Args:
      q: [B,T,H,D], in the layout's order (`SequenceLayout.permute`); float32, bfloat16 or float16. Where the devices do
        not divide T, the arrays are padded inside, which moves all of them: pad in your loader to spare that.
      k: [B,T,K,D] in the dtype of q; K divides H, each key/value head serving H/K query heads.
      v: [B,T,K,D]. As in dense attention, hidden keys and values must be finite, too: 0 times NaN is NaN. What is not
        reaches all queries that see it and may reach others of the same sequence and head, by layout and tiles.
      mesh: the devices; `axis_name` is one of its axes. Axes may be Auto, Explicit or, of a `shard_map` around the
        call, Manual; an AbstractMesh does for `eval_shape` and for compiling ahead of time. By default the mesh that
        `jax.set_mesh` set.
      strategy: how queries and keys of different devices meet: a name from `STRATEGIES`, or one of its values with
        other options. Most are exact; `STRATEGIES[name].exact` says so.
      axis_name: the mesh axis that T is sharded over.
      spec: PartitionSpec of q, of k and of v. By default B and heads over the axes that shard those of q already, where
        that is known (Explicit types and concrete arrays tell it, Auto axes inside `jit` do not), and over those of dp
        and fsdp, and of tp, that the mesh has. Needed where other axes of the mesh would be left.
      layout: "contiguous", "zigzag", "striped" or a SequenceLayout. The last two share causal work out evenly.
      causal: a token sees itself and those before it in the natural order; otherwise all of them.
      window: a token sees itself and the window-1 tokens before it, and after it where causal is False. A ring sends
        keys no farther than it reaches: if it fits in a shard, one hop in contiguous and zigzag layouts.
      segment_ids: integers [B,T] in the layout's order; a token sees its own segment only.
      max_segment_len: no segment is longer than this, so that keys need not be sent farther. It acts like a window: in
        a segment that is longer after all, tokens this far apart do not see each other.
      softcap: scores x become softcap * tanh(x / softcap).
      scale: of the products of queries and keys; D**-0.5 by default.
      sinks: [H], a logit for each head that takes part in the softmax but has no value; can be differentiated.
      alibi_slopes: [H]; a score falls by the slope for each position of distance. Constants: no gradient flows to them.
      dropout_rate: of weights. Which ones are dropped depends on the key and their global batch row, head and positions
        alone: the same on any mesh and in any layout.
      dropout_key: a `jax.random` key, needed with dropout; inside a `shard_map` over other axes, one for each device
        along these.
      impl: name of the kernel that computes tiles, or "auto".
      block_sizes: sizes of the kernel's tiles.
      **options: of the strategy, for example `duplex=True` for "ring" or `ulysses_size=4` for "usp"; its class in
        `STRATEGIES` describes them.

    Returns:
      [B,T,H,D] in the dtype of q and sharded as `spec` says; 0 where a query sees no key. Where q's type, or the mesh
      set, has Explicit axes, so has the result's; an axis that the devices do not divide is whole there.

    Raises:
      ValueError: for shapes, dtypes, values, names or meshes that do not fit, before anything compiles.
    """
    require_attention_shapes(q, k, v)
    require_attention_dtypes(q, k, v)
    given, mesh = mesh, find_mesh(mesh, axis_name)
    _require_as_many_keys(q, k)
    layout = as_layout(layout, mesh.shape[axis_name])
    require_platform(find_kernel(impl), platform_of(mesh))
    if spec is None:
        spec = default_spec(mesh, axis_name, known_spec(q, mesh), sizes=(k.shape[0], k.shape[2]))
    spec = spec_on(spec, given, mesh)
    check_spec(spec, mesh, axis_name, q, k)
    if segment_ids is not None:
        require_integers("segment_ids", segment_ids, q.shape[:2], "BT")
    check_mask_spec(causal, window, softcap, scale, dropout_rate, dropout_key)
    _shorter(window, max_segment_len, segment_ids)  # which checks both
    sinks, alibi_slopes = (of_heads(*x, q.shape[2]) for x in (("sinks", sinks), ("alibi_slopes", alibi_slopes)))
    run = _sharded(
        mesh,
        spec,
        strategy=find_strategy(strategy, options, context_attention),
        axis_name=axis_name,
        layout=layout,
        causal=causal,
        window=window,
        max_segment_len=max_segment_len,
        softcap=None if softcap is None else float(softcap),
        scale=None if scale is None else float(scale),
        dropout_rate=float(dropout_rate),
        impl=impl,
        block_sizes=as_blocks(block_sizes),
    )
    with only_reverse_mode():
        return run(q, k, v, segment_ids, sinks, alibi_slopes, dropout_key)


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str = "sp",
    spec: PartitionSpec | None = None,
    layout: str | SequenceLayout = "contiguous",
    causal: bool = True,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    max_segment_len: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    duplex: bool = False,
    unroll: bool = False,
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
) -> jax.Array:
    """Exact attention over a sequence sharded across the devices of `mesh`: `context_attention` by ring.

    Keys and values travel around the ring, each device attending to those at hand while the next ones are on their way
    (Liu, Zaharia & Abbeel 2023). Memory per device depends on its shard, not on the length of the sequence.

    Args:
      q: [B,T,H,D], in the layout's order.
      k, v: [B,T,K,D].
      mesh: the devices, by default those of `jax.set_mesh`.
      duplex: send the second half of each shard the other way round, for links that carry both directions at once.
      unroll: write the steps of the ring out instead of looping over them (docs/structure.md compares the programs).
      others: as in `context_attention`.

    Returns:
      [B,T,H,D] in the dtype of q and sharded like it; 0 where a query sees no key.

    Raises:
      ValueError: for shapes, dtypes, values, names or meshes that do not fit, before anything compiles.
    """
    return context_attention(
        q,
        k,
        v,
        mesh=mesh,
        strategy=Ring(duplex=duplex, unroll=unroll),
        axis_name=axis_name,
        spec=spec,
        layout=layout,
        causal=causal,
        window=window,
        segment_ids=segment_ids,
        max_segment_len=max_segment_len,
        softcap=softcap,
        scale=scale,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        impl=impl,
        block_sizes=block_sizes,
    )


def ring_attention_shard(q: jax.Array, k: jax.Array, v: jax.Array, **arguments) -> jax.Array:
    """`ring_attention` for use inside your own `shard_map`: `context_attention_shard` by ring, with its arguments."""
    return context_attention_shard(q, k, v, strategy="ring", **arguments)


@functools.lru_cache(maxsize=128)
def _sharded(mesh: Mesh | AbstractMesh, spec: PartitionSpec, **settings):
    """`context_attention_shard` over global arrays, compiled once for each set of choices."""
    layout = settings["layout"]
    batch_axes, _, head_axes, _ = axes_of_spec(spec)

    def run(shard_map, q, k, v, segment_ids, sinks, alibi_slopes, dropout_key):
        T = q.shape[1]
        padded = layout.padded_length(T)
        # Padding comes last in the natural order; in the layout's it may stand anywhere.
        real = None if padded == T else np.flatnonzero(layout.positions(padded) < T)

        def on_shards(q, k, v, segment_ids, sinks, alibi_slopes, dropout_key):
            return context_attention_shard(
                q,
                k,
                v,
                segment_ids=segment_ids,
                sinks=sinks,
                alibi_slopes=alibi_slopes,
                dropout_key=dropout_key,
                batch_offset=_shard_number(batch_axes) * q.shape[0],
                head_offset=_shard_number(head_axes) * q.shape[2],
                seq_len=None if real is None else T,
                **settings,
            )

        heads = PartitionSpec(head_axes or None)
        in_specs = (spec, spec, spec, PartitionSpec(*spec[:2]), heads, heads, PartitionSpec())
        sharded = shard_map(on_shards, in_specs, spec)
        if real is not None:
            q, k, v, segment_ids = (
                None if x is None else jnp.zeros((x.shape[0], padded, *x.shape[2:]), x.dtype).at[:, real].set(x)
                for x in (q, k, v, segment_ids)
            )
        out = sharded(q, k, v, segment_ids, sinks, alibi_slopes, dropout_key)
        return out if real is None else out[:, real]

    return on_mesh(mesh, spec, run)


def _shard_number(axes: tuple[str, ...]):
    """Which of the shards along these mesh axes this device holds."""
    return lax.axis_index(axes) if axes else 0
