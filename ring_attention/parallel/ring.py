"""Ring attention: key/value blocks travel around a ring of devices while each attends to the block it holds.

Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context". Device i of P starts
with its own block and passes what it holds to device i+1, so at step s it holds the block of device i-s. A block is
sent on before it is used, so that the transfer runs beside the computation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import find_kernel
from ring_attention.attention.kernels.contract import Kernel, Whole
from ring_attention.attention.masks import Hop, Tokens
from ring_attention.attention.varying import axes_of, vary_over, vary_together
from ring_attention.checks import (
    require,
    require_attention_dtypes,
    require_attention_shapes,
    require_divisible,
    require_shape,
)
from ring_attention.parallel.layouts import SequenceLayout, as_layout
from ring_attention.parallel.mesh import DATA, FSDP, TENSOR

SAVED_NAMES = ("ring_attention_out", "ring_attention_lse")
"""`checkpoint_name`s of what a remat policy must keep so that no ring runs twice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ring:
    """What is the same for every step of a ring."""

    axis_name: str
    layout: SequenceLayout
    causal: bool
    scale: float
    kernel: Kernel
    blocks: BlockSizes

    @property
    def size(self) -> int:
        return self.layout.ring_size

    def rotate(self, tree):
        """Pass every array on to the next device."""
        shift = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, shift), tree)

    def scan(self, body, carry, steps: range):
        """`body(carry, step) -> carry` over `steps`.

        A loop, not an unrolled one: the compiler would start all transfers at once, and memory would grow with P.
        """
        return lax.scan(lambda c, s: (body(c, s), None), carry, jnp.array(steps, jnp.int32))[0]

    def hop(self, step, length: int, q_segments, k_segments) -> Hop:
        """Where the resident queries and the keys that visit at `step` stand."""
        me = lax.axis_index(self.axis_name)
        visitor = lax.rem(me - step + self.size, self.size)
        positions = [self.layout.shard_positions(shard, length)[None] for shard in (me, visitor)]
        return Hop(Tokens(positions[0], q_segments), Tokens(positions[1], k_segments), self.causal)


def ring_attention_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str = "sp",
    layout: str | SequenceLayout = "contiguous",
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
) -> jax.Array:
    """Ring attention for use inside your own `shard_map`.

    A `vmap` with an axis name works too, for rings larger than the machine; take gradients inside it, because JAX does
    not know the name any more when it differentiates from outside.

    Args:
      q: this device's slice [B,t,H,D] of the queries, in the layout's order; float32, bfloat16 or float16.
      k: this device's slice [B,t,K,D] of the keys, in the dtype of q; K divides H.
      v: this device's slice [B,t,K,D] of the values.
      axis_name: the axis that the sequence is sharded over.
      layout: the order in which tokens were dealt to devices, a name or a SequenceLayout.
      causal: a token sees itself and those before it in the natural order; otherwise all of them.
      segment_ids: this device's slice, integers [B,t]; a token sees its own segment only.
      scale: of the scores; D**-0.5 by default.
      impl: name of the kernel that computes a hop, or "auto".
      block_sizes: sizes of the kernel's tiles.

    Returns:
      This device's slice [B,t,H,D] of the output, in the dtype of q; 0 where a query sees no key.

    Raises:
      ValueError: for shapes, dtypes or names that do not fit, before anything compiles.
    """
    require_attention_shapes(q, k, v)
    require_attention_dtypes(q, k, v)
    B, t, _, D = q.shape
    require_shape("k", k.shape, (B, t, None, D), "BtKD")
    layout = as_layout(layout, lax.axis_size(axis_name))
    layout.check_length(t * layout.ring_size)
    if segment_ids is not None:
        require_shape("segment_ids", segment_ids.shape, (B, t), "Bt")
        segment_ids = segment_ids.astype(jnp.int32)
    ring = _Ring(
        axis_name=axis_name,
        layout=layout,
        causal=causal,
        scale=D**-0.5 if scale is None else scale,
        kernel=find_kernel(impl),
        blocks=block_sizes or BlockSizes(),
    )
    q, k, v, segment_ids, _ = vary_together(q, k, v, segment_ids, lax.axis_index(axis_name))
    return _attend(ring, q, k, v, segment_ids)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q, k, v, segments):
    """(out, lse) over the whole ring: P hops, P-1 transfers of each block."""

    def attend(step, block):
        k, v, k_segments = block
        return ring.kernel.forward(q, k, v, ring.hop(step, q.shape[1], segments, k_segments), ring.scale, ring.blocks)

    def body(carry, step):
        running, block = carry
        following = ring.rotate(block)
        return online_softmax.absorb(running, *attend(step, block)), following

    nothing = vary_over(online_softmax.Running.empty(q.shape), axes_of(q))
    running, block = ring.scan(body, (nothing, (k, v, segments)), range(ring.size - 1))
    out, lse = online_softmax.finish(online_softmax.absorb(running, *attend(ring.size - 1, block)))
    return out.astype(q.dtype), lse


def _attend_forward(ring: _Ring, q, k, v, segments):
    results = _attend(ring, q, k, v, segments)
    out, lse = (checkpoint_name(x, name) for x, name in zip(results, SAVED_NAMES, strict=True))
    return (out, lse), (q, k, v, segments, out, lse)


def _attend_backward(ring: _Ring, residuals, cotangents):
    """Gradients: P-1 transfers of K and V, P of dK and dV, which follow their block around the ring and home again."""
    q, k, v, segments, out, lse = residuals
    whole = Whole.of(out, lse, *cotangents)

    def gradients(step, block):
        k, v, k_segments = block
        hop = ring.hop(step, q.shape[1], segments, k_segments)
        dq, dk, dv = ring.kernel.backward(q, k, v, whole, hop, ring.scale, ring.blocks)
        return dq, (dk, dv)

    def body(carry, step):
        dq, block, dblock = carry
        following, arriving = ring.rotate((block, dblock))  # dblock of the last hop travels while this one computes
        dq_here, dblock_here = gradients(step, block)
        return dq + dq_here, following, jax.tree.map(jnp.add, arriving, dblock_here)

    block = (k, v, segments)
    if ring.size == 1:
        dq, dblock = gradients(0, block)
    else:
        following = ring.rotate(block)
        dq, dblock = gradients(0, block)
        dq, block, dblock = ring.scan(body, (dq, following, dblock), range(1, ring.size - 1))
        arriving = ring.rotate(dblock)
        dq_here, dblock_here = gradients(ring.size - 1, block)
        dq, dblock = dq + dq_here, ring.rotate(jax.tree.map(jnp.add, arriving, dblock_here))
    dk, dv = dblock
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh,
    axis_name: str = "sp",
    spec: PartitionSpec | None = None,
    layout: str | SequenceLayout = "contiguous",
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    block_sizes: BlockSizes | None = None,
) -> jax.Array:
    """Exact attention over a sequence sharded across the devices of `mesh`.

    Args:
      q: [B,T,H,D], in the layout's order (`SequenceLayout.permute`); float32, bfloat16 or float16.
      k: [B,T,K,D] in the dtype of q; K divides H, each key/value head serving H/K query heads.
      v: [B,T,K,D].
      mesh: the devices; `axis_name` is one of its axes.
      axis_name: the mesh axis that T is sharded over.
      spec: PartitionSpec of q, of k and of v. By default B over those of dp and fsdp, and heads over tp, that the mesh
        has.
      layout: "contiguous", "zigzag", "striped" or a SequenceLayout. The last two share causal work out evenly.
      causal: a token sees itself and those before it in the natural order; otherwise all of them.
      segment_ids: integers [B,T] in the layout's order; a token sees its own segment only.
      scale: of the scores; D**-0.5 by default.
      impl: name of the kernel that computes a hop, or "auto".
      block_sizes: sizes of the kernel's tiles.

    Returns:
      [B,T,H,D] in the dtype of q and sharded like it; 0 where a query sees no key.

    Raises:
      ValueError: for shapes, dtypes, names or meshes that do not fit, before anything compiles.
    """
    require_attention_shapes(q, k, v)
    require_attention_dtypes(q, k, v)
    require(
        axis_name in mesh.shape, f"axis_name={axis_name!r} is not an axis of the mesh, which has {dict(mesh.shape)}"
    )
    require_shape("k", k.shape, (q.shape[0], q.shape[1], None, q.shape[3]), "BTKD")
    layout = as_layout(layout, mesh.shape[axis_name])
    layout.check_length(q.shape[1])
    spec = _default_spec(mesh, axis_name) if spec is None else spec
    _check_spec(spec, mesh, axis_name, q, k)
    if segment_ids is not None:
        require_shape("segment_ids", segment_ids.shape, q.shape[:2], "BT")
    attend = _sharded(mesh, spec, axis_name, layout, causal, scale, impl, block_sizes)
    return attend(q, k, v, segment_ids)


@functools.lru_cache(maxsize=128)
def _sharded(mesh: Mesh, spec: PartitionSpec, axis_name, layout, causal, scale, impl, block_sizes):
    """`ring_attention_shard` over global arrays, compiled once for each set of choices."""
    settings = dict(axis_name=axis_name, layout=layout, causal=causal, scale=scale, impl=impl, block_sizes=block_sizes)

    def on_shards(q, k, v, segment_ids):
        return ring_attention_shard(q, k, v, segment_ids=segment_ids, **settings)

    in_specs = (spec, spec, spec, PartitionSpec(*spec[:2]))
    return jax.jit(jax.shard_map(on_shards, mesh=mesh, in_specs=in_specs, out_specs=spec))


def _default_spec(mesh: Mesh, axis_name: str) -> PartitionSpec:
    batch = tuple(axis for axis in (DATA, FSDP) if axis in mesh.shape)
    return PartitionSpec(batch or None, axis_name, TENSOR if TENSOR in mesh.shape else None, None)


def _check_spec(spec: PartitionSpec, mesh: Mesh, axis_name: str, q, k) -> None:
    require(
        len(spec) >= 2 and spec[1] == axis_name and (len(spec) < 4 or spec[3] is None),
        f"spec={spec} must shard axis 1 (tokens) over {axis_name!r} alone and leave axis 3 (head_dim) whole; "
        f"for example {_default_spec(mesh, axis_name)}",
    )
    for axis, names in ((0, "batch"), (2, "heads")):
        entry = spec[axis] if axis < len(spec) else None
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        shards = 1
        for name in axes:
            require(
                name in mesh.shape,
                f"spec={spec} names {name!r}, but the mesh has {dict(mesh.shape)}; drop it from spec",
            )
            shards *= mesh.shape[name]
        for array_name, array in (("q", q), ("k", k)):
            label = f"{names} of {array_name}"
            require_divisible(
                label, array.shape[axis], "x".join(axes) or "1", shards, "use fewer devices on these axes"
            )
