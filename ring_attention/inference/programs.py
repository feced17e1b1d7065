"""The programs of generation, written for one device of the mesh: a prompt's prefill, whole or a piece, and a step.

Prefill is the forward pass of training: tokens are sharded over the ring, weights are gathered where they are used, and
any exact strategy brings queries and keys together; it leaves keys and values in the cache. A step has one token a row,
the same on all devices of a ring: weights and cache stay where they are, and small activations travel.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ring_attention.attention.cached import Cache
from ring_attention.inference.cache import CACHE_SPEC, KeyValueCache, is_circle
from ring_attention.inference.plan import Plan
from ring_attention.inference.sampling import sample
from ring_attention.models.products import GATHERED, Stationary
from ring_attention.models.transformer import Transformer, model_builder, parameter_specs
from ring_attention.parallel.decode import decode_attention_shard
from ring_attention.parallel.extend import extend_attention_shard, own_stripe
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import DATA, FSDP, SEQUENCE, TENSOR, compiler_options
from ring_attention.training.attend import attention_of, mask_of, scores_of

ROWS = PartitionSpec(DATA)


class Rows(NamedTuple):
    """The newest token, position and seed of each row of a batch.

    Attributes:
      tokens: int32 [B], the newest, not in the cache yet.
      positions: int32 [B], the positions of these tokens.
      seeds: uint32 [B], one for each row's draws.
    """

    tokens: jax.Array
    positions: jax.Array
    seeds: jax.Array


def make_prefill(plan: Plan, mesh: Mesh):
    """Return prefill(params, tokens, lengths, seeds) -> (cache, rows), compiled for `mesh`.

    tokens int32 [B,T] are the prompts in the striped layout, each padded at its end; lengths int32 [B] and seeds uint32
    [B] are theirs. The rows hold the token after each prompt.
    """
    build, P = model_builder(plan.model), mesh.shape[SEQUENCE]
    layout, one_document = SequenceLayout("striped", P), dataclasses.replace(plan.attention, max_segment_len=0)
    attend_all = attention_of(one_document, plan.model, P)

    def on_device(params, tokens_bt, lengths_b, seeds_b):
        (b, t), me, model = tokens_bt.shape, lax.axis_index(SEQUENCE), build(params)
        positions_bt = jnp.broadcast_to(layout.shard_positions(me, t), (b, t))

        def attend(q, k, v, this, cache, run, place):
            held, kind = cache[run.name], plan.runs[run.name].kind
            if is_circle(kind, plan.capacity):
                held = held.with_tokens(place, k, v, positions_bt, lengths_b, circle=True)
            else:
                held = held.with_prompt(place, k, v)
            return attend_all(q, k, v, this._replace(kind=kind), segment_ids=None), cache | {run.name: held}

        hidden_btM, cache = model.with_cache(
            tokens_bt,
            positions=positions_bt,
            length=plan.capacity,
            cache={name: KeyValueCache.empty(plan.model, run, b, plan.capacity) for name, run in plan.runs.items()},
            attend=attend,
            products=GATHERED,
        )
        last_b = lengths_b - 1
        last_bM = hidden_btM[jnp.arange(b), last_b // P]
        mine_b1 = (last_b % P == me)[:, None]
        last_bM = lax.psum(jnp.where(mine_b1, last_bM, 0), (FSDP, SEQUENCE))
        return cache, Rows(_next_tokens(plan, model, last_bM, seeds_b, lengths_b), lengths_b, seeds_b)

    specs = (parameter_specs(plan.model), PartitionSpec(DATA, SEQUENCE), ROWS, ROWS)
    out_specs = _state_specs(plan)
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=out_specs)
    return jax.jit(sharded, compiler_options=compiler_options(mesh))


def make_step(plan: Plan, mesh: Mesh):
    """Return step(params, cache, rows) -> (cache, rows), compiled for `mesh`: each row gets its next token.

    The cache is written in place: its buffers are donated. On each layer a device sends and gets, with b rows of its
    own and h = H/tp, k = K/tp, f = F/tp, m = M/sp (bytes that arrive, each collective's whole result):
      all-reduce over sp     4 b (h + 2k) D and 4 b 2f, the sums of what the shares of M make of q, k, v and of SwiGLU
      all-gather over sp     4 b sp h (D + 1), the merge of attention; and twice c b M, the shares of its output and
                             the feed-forward's, in the compute dtype of c bytes
      all-reduce over tp     twice c b m
    and once a token: c b m (all-reduce over tp) and c b M (all-gather over sp) for the embedding, 4 b V/tp (all-reduce
    over sp) and 4 b V (all-gather over tp) for the scores. The cache and the weights go nowhere.
    """
    build = model_builder(plan.model)
    decode = functools.partial(
        decode_attention_shard, axis_name=SEQUENCE, heads_first=True, block_sizes=plan.attention.block_sizes
    )

    def on_device(params, cache, rows):
        model = build(params)

        def attend(q, k, v, this, cache, run, place):
            circle, lengths = is_circle(plan.runs[run.name].kind, plan.capacity), rows.positions + 1
            held = cache[run.name].with_tokens(place, k, v, rows.positions[:, None], lengths, circle=circle)
            settings = scores_of(plan.attention, plan.model, this, q.shape[2]) | mask_of(plan.runs[run.name].kind)
            slots = held.positions(lengths) if circle else None
            out = decode(q, held.k, held.v, layer=place, lengths=lengths, slot_positions=slots, **settings)
            return out, cache | {run.name: held}

        hidden_b1M, cache = model.with_cache(
            rows.tokens[:, None],
            positions=rows.positions[:, None],
            length=plan.capacity,
            cache=cache,
            attend=attend,
            products=Stationary(plan.model.model_dim),
        )
        positions = rows.positions + 1
        tokens = _next_tokens(plan, model, hidden_b1M[:, 0], rows.seeds, positions)
        return cache, Rows(tokens, positions, rows.seeds)

    state = _state_specs(plan)
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=(parameter_specs(plan.model), *state), out_specs=state)
    return jax.jit(sharded, donate_argnums=(1, 2), compiler_options=compiler_options(mesh))


def make_extend(plan: Plan, mesh: Mesh):
    """Return extend(params, cache, rows, tokens, first) -> (cache, rows), compiled for `mesh`: a piece of the prompts.

    tokens int32 [B,T] are those at positions first, first+1, ... of each prompt, the same on all devices of a ring,
    which T divides; `rows.positions` are the prompts' lengths, from which on there is padding. The row of a prompt that
    ends in the piece gets the token after it. The cache is written in place.

    Weights stay where they are, as in `make_step`, and activations of T tokens travel: what is said there of a token,
    times T. What a device holds at once grows with T, and not with the prompt.
    """
    build = model_builder(plan.model)

    def on_device(params, cache, rows, tokens_bT, first):
        (b, T), model = tokens_bT.shape, build(params)
        positions_bT = jnp.broadcast_to(first + jnp.arange(T, dtype=jnp.int32), (b, T))
        before, after = jnp.minimum(rows.positions, first), jnp.minimum(rows.positions, first + T)

        def attend(q, k, v, this, cache, run, place):
            held, kind = cache[run.name], plan.runs[run.name].kind
            own, circle = [own_stripe(x, SEQUENCE) for x in (k, v, positions_bT)], is_circle(kind, plan.capacity)
            written = held.with_tokens(place, *own, after, circle=circle)
            seen = held if circle else written  # to write what is read already, compilers would copy all of it
            out = extend_attention_shard(
                q,
                Cache(seen.k, seen.v, place, heads_first=True),
                own=(k, v) if circle else None,
                first=first,
                slot_positions=seen.positions(before if circle else after),
                axis_name=SEQUENCE,
                block_sizes=plan.attention.block_sizes,
                **scores_of(plan.attention, plan.model, this, q.shape[2]),
                **mask_of(kind),
            )
            return out, cache | {run.name: written}

        hidden_bTM, cache = model.with_cache(
            tokens_bT,
            positions=positions_bT,
            length=plan.capacity,
            cache=cache,
            attend=attend,
            products=Stationary(plan.model.model_dim),
        )
        last_b = rows.positions - 1 - first
        last_bM = hidden_bTM[jnp.arange(b), jnp.clip(last_b, 0, T - 1)]
        found_b = _next_tokens(plan, model, last_bM, rows.seeds, rows.positions)
        tokens_b = jnp.where((last_b >= 0) & (last_b < T), found_b, rows.tokens)
        return cache, Rows(tokens_b, rows.positions, rows.seeds)

    state = _state_specs(plan)
    specs = (parameter_specs(plan.model), *state, PartitionSpec(DATA), PartitionSpec())
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=state)
    return jax.jit(sharded, donate_argnums=(1, 2), compiler_options=compiler_options(mesh))


def make_cache(plan: Plan, mesh: Mesh, rows: int):
    """Return make() -> an empty cache for so many rows on `mesh`, a dict by the names of the runs of layers."""
    b = rows // mesh.shape[DATA]

    def on_device():
        return {name: KeyValueCache.empty(plan.model, run, b, plan.capacity) for name, run in plan.runs.items()}

    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(), out_specs=_state_specs(plan)[0]))


def _state_specs(plan: Plan) -> tuple[dict[str, KeyValueCache], Rows]:
    """PartitionSpecs of the caches, by the names of their runs, and of the rows."""
    caches = {name: KeyValueCache(CACHE_SPEC, CACHE_SPEC) for name in plan.runs}
    return caches, Rows(ROWS, ROWS, ROWS)


def _next_tokens(plan: Plan, model: Transformer, hidden_bM, seeds_b, positions_b) -> jax.Array:
    """Choose the token at each position, int32 [b], by the scores that these hidden states make."""
    logits_bv = model.logits_of(hidden_bM[:, None], Stationary(plan.model.model_dim))[:, 0]
    logits_bV = lax.all_gather(logits_bv, TENSOR, axis=1, tiled=True, to="invarying")
    known = jnp.arange(logits_bV.shape[1]) < plan.vocab_size
    return sample(plan.sampling, jnp.where(known, logits_bV, -jnp.inf), seeds_b, positions_b)
