"""Attention over arrays whose batch and heads a mesh shards: each device computes its own, and nothing is sent.

A loop over tiles that XLA has to partition is run by every device for all sequences and heads, which are gathered
first. So the loop runs inside a `shard_map` wherever it is known what shards batch and heads.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from ring_attention.attention.axis_types import auto_mesh, mesh_of, names_of
from ring_attention.attention.masks import BlockPair
from ring_attention.attention.varying import vary_together

AXES_OF_BATCH, AXES_OF_HEADS = ("dp", "fsdp"), ("tp",)
"""What axes of these names shard where nothing else is known of an array: `make_mesh` calls them so."""

_log = logging.getLogger(__name__)


class Shards(NamedTuple):
    """What shards the arrays: the mesh, and the names of its axes over which batch and heads are."""

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]


def shards_of(q: jax.Array, k: jax.Array, others) -> Shards | None:
    """What shards the batch and the heads of q [B,T,H,D] and k [B,S,K,D]; None where nothing does.

    Types tell it of Explicit axes, concrete arrays of all. Of other Auto axes those called dp, fsdp and tp are taken as
    ever; what else there is of several devices may shard something that is then gathered, and the log says so, once.
    """
    placed = None if isinstance(q, Tracer) else getattr(q, "sharding", None)
    known = jax.typeof(q).sharding if placed is None else placed
    if not isinstance(known, NamedSharding):
        return None
    mesh = get_abstract_mesh() if known.mesh.empty else known.mesh
    meshes = {mesh_of(x).shape_tuple for x in jax.tree.leaves((k, others)) if not mesh_of(x).empty}
    if mesh.empty or mesh.size == 1 or meshes - {mesh.shape_tuple}:
        return None
    if mesh.manual_axes:  # gradients of one shard_map inside another fail in JAX 0.10 to 0.12
        _warn([name for name in mesh.shape if name not in mesh.manual_axes and mesh.shape[name] > 1])
        return None
    batch, tokens, heads, features = (list(names_of(entry)) for entry in [*known.spec, *[None] * 4][:4])
    named = {*batch, *tokens, *heads, *features}
    guessed = [] if known is placed else [x for x in mesh.auto_axes if x not in named and mesh.shape[x] > 1]
    batch += [name for name in guessed if name in AXES_OF_BATCH]
    heads += [name for name in guessed if name in AXES_OF_HEADS]
    batch = batch if q.shape[0] % _number(mesh, batch) == 0 else []
    heads = heads if math.gcd(q.shape[2], k.shape[2]) % _number(mesh, heads) == 0 else []
    rest = [name for name in (*named, *guessed) if name not in batch + heads and mesh.shape[name] > 1]
    _warn(rest)
    return Shards(mesh, tuple(batch), tuple(heads)) if _number(mesh, batch + heads) > 1 else None


def on_shards(attend: Callable, static, shards: Shards, args: tuple) -> tuple[jax.Array, jax.Array]:
    """`attend(static, *args)` on each device, for its own sequences and heads.

    Args:
      attend: gives out [B,H,T,D_v] and lse [B,H,T].
      static: hashable.
      shards: what `shards_of` found.
      args: q [B,H,T,D], k [B,K,S,D], v [B,K,S,D_v], the block pair, and sinks [H] or None.
    """
    return _on_shards(attend, static, shards._replace(mesh=auto_mesh(shards.mesh)), args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _on_shards(attend: Callable, static, shards: Shards, args: tuple):
    spec = PartitionSpec(shards.batch or None, shards.heads or None)
    q, _, _, pair, sinks = args
    specs = (spec, spec, spec, _specs_of_pair(pair, spec), None if sinks is None else PartitionSpec(spec[1]))

    def shard(*args):
        return attend(static, *vary_together(*args))

    names = frozenset(shards.mesh.axis_names)
    return jax.shard_map(shard, mesh=shards.mesh, in_specs=specs, out_specs=spec, axis_names=names)(*args)


def _specs_of_pair(pair: BlockPair, spec: PartitionSpec):
    """The specs of a block pair's arrays: what has one row for all sequences is everywhere."""
    batch, heads = (PartitionSpec(entry) for entry in spec)
    places = {
        "batch": batch,
        "heads": heads,
        "slopes": heads,
        "seeds": PartitionSpec(),
        "traced_scale": PartitionSpec(),
    }

    def of(path, x):
        last = path[-1].name
        return places[last] if last in places else batch if x.shape[0] > 1 else PartitionSpec()

    return jax.tree_util.tree_map_with_path(of, pair)


def _number(mesh: Mesh | AbstractMesh, names) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _warn(names: list[str]) -> None:
    """Say that what these axes shard may be gathered, if there are any."""
    if names:
        _warn_once(tuple(sorted(names)))


@functools.cache
def _warn_once(names: tuple[str, ...]) -> None:
    _log.warning(
        "blockwise_attention: what mesh axes %s shard is not known to be batch or heads in equal parts, and is "
        "gathered; call it inside a shard_map over them, or context_attention where they shard the sequence",
        ", ".join(map(repr, names)),
    )
