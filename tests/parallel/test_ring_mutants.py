"""Mutants: each is a mistake that a ring can make, and the comparison with the oracle must see it where it shows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import ALL_NAMES, PLAIN, Bound, quickly, results, sharded

import ring_attention as ra
from ring_attention.attention import kernels, online_softmax, sinks
from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.masks import Tokens
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.weights import BlockScores
from ring_attention.parallel import context, counted_ring, ring, shard
from ring_attention.parallel.ring_pass import RingPass
from ring_attention.testing import NAMES, random_qkv, random_segments

# --- What travels, how far and which way ------------------------------------------------------------------------------


def _wrong_way(patch):
    send = RingPass.send
    patch.setattr(RingPass, "send", lambda self, tree, shift: send(self, tree, -shift))


def _segments_stay_at_home(patch):
    send = RingPass.send

    def mutant(self, tree, shift):
        return jax.tree.map(lambda old, new: old if old.dtype == jnp.int32 else new, tree, send(self, tree, shift))

    patch.setattr(RingPass, "send", mutant)


def _routes(more_hops=0, **more):
    """A mutant whose blocks travel so many hops more, or for a window of so many tokens more."""

    def mutate(patch):
        plan = ring.plan_routes

        def mutant(*args, **kwargs):
            kwargs |= {name: kwargs[name] + value for name, value in more.items()}
            return tuple(dataclasses.replace(route, hops=route.hops + more_hops) for route in plan(*args, **kwargs))

        patch.setattr(ring, "plan_routes", mutant)

    return mutate


def _gradients_stay_behind(patch):
    pass_on = RingPass.pass_on
    patch.setattr(
        RingPass, "pass_on", lambda self, number, tree: tree if isinstance(tree, list) else pass_on(self, number, tree)
    )


def _gradients_are_not_sent_back(patch):
    patch.setattr(RingPass, "send_back", lambda self, number, tree: tree)


def _gradients_are_not_sent_home(patch):
    patch.setattr(counted_ring, "_sent_home", lambda ring, tree, hops, direction: tree)


def _fewer_hops(patch):
    count = ring.count_hops

    def mutant(*args):
        hops = count(*args)
        return hops._replace(forth=hops.forth - 1)

    patch.setattr(ring, "count_hops", mutant)


# --- Where tokens stand -----------------------------------------------------------------------------------------------


def _wrong_source(patch):
    def mutant(self, number, segments, step):
        return pair(self, number, segments, self.context.layout.ring_size - step)

    pair = RingPass.remote_pair
    patch.setattr(RingPass, "remote_pair", mutant)


def _wrong_shift(patch):
    pair = RingPass.pair_from
    patch.setattr(RingPass, "pair_from", lambda self, shift, keys: pair(self, -shift, keys))


def _positions_of_another_layout(patch):
    positions = ra.SequenceLayout.shard_positions
    other = lambda self, *args: positions(ra.SequenceLayout("contiguous", self.ring_size), *args)  # noqa: E731
    patch.setattr(ra.SequenceLayout, "shard_positions", other)


def _window(more):
    def mutate(patch):
        make_mask_spec = shard.make_mask_spec

        def mutant(*args, **kwargs):
            return make_mask_spec(*args, **(kwargs | dict(window=kwargs["window"] + more)))

        patch.setattr(shard, "make_mask_spec", mutant)

    return mutate


def _off_by_one(low: int, high: int):
    """A mutant whose intervals begin or end another token later."""

    def mutate(patch):
        more = shard._more_of_tokens

        def mutant(*args):
            of_queries, of_keys = more(*args)
            return dict(low=of_queries["low"] + low, high=of_queries["high"] + high), of_keys

        patch.setattr(shard, "_more_of_tokens", mutant)

    return mutate


def _stays_at_home(name):
    """A mutant with this field of keys that does not travel with them."""

    def mutate(patch):
        send = RingPass.send

        def mutant(self, tree, shift):
            def of(old, new):
                return dataclasses.replace(new, **{name: getattr(old, name)}) if isinstance(new, Tokens) else new

            return jax.tree.map(of, tree, send(self, tree, shift), is_leaf=lambda x: isinstance(x, Tokens))

        patch.setattr(RingPass, "send", mutant)

    return mutate


# --- Statistics -------------------------------------------------------------------------------------------------------


def _with_kernel(patch, **functions):
    patch.setitem(kernels.KERNELS, "plain", PLAIN._replace(**functions))


def _hops_weigh_alike(patch):
    def forward(q, k, v, pair, state, blocks):
        here = PLAIN.forward(q, k, v, pair, jax.tree.map(jnp.zeros_like, state)._replace(max=state.max), blocks)
        return SoftmaxState(state.acc + here.acc, here.max, state.sum + here.sum)

    _with_kernel(patch, forward=forward)


def _lse_in_bfloat16(patch):
    def mutant(state, sinks_H):
        out, lse = finalize(state, sinks_H)
        return out, lse.astype(jnp.bfloat16).astype(jnp.float32)

    finalize = sinks.finalize
    patch.setattr(sinks, "finalize", mutant)


def _lse_of_the_hop(patch):
    def backward(q, k, v, stats, pair, dq, blocks):
        out, lse = online_softmax.finalize(PLAIN.forward(q, k, v, pair, SoftmaxState.empty(q.shape), blocks))
        return PLAIN.backward(q, k, v, GlobalStats.of(out.astype(q.dtype), lse, stats.dout), pair, dq, blocks)

    _with_kernel(patch, backward=backward)


# --- The backward pass ------------------------------------------------------------------------------------------------


def _stale_keys_in_the_backward_pass(patch):
    first = {}

    def backward(q, k, v, *rest):
        return PLAIN.backward(q, *first.setdefault(k.shape, (k, v)), *rest)

    _with_kernel(patch, backward=backward)


def _without_a_hop_of_the_backward_pass(number):
    def mutate(patch):
        calls = []

        def backward(q, k, v, stats, pair, dq, blocks):
            calls.append(pair)
            if len(calls) == number:
                return dq, jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
            return PLAIN.backward(q, k, v, stats, pair, dq, blocks)

        _with_kernel(patch, backward=backward)

    return mutate


def _dk_and_dv_swapped(patch):
    def backward(*args):
        dq, dk, dv = PLAIN.backward(*args)
        return dq, dv, dk

    _with_kernel(patch, backward=backward)


def _dq_of_the_last_hop_alone(patch):
    def backward(q, k, v, stats, pair, dq, blocks):
        return PLAIN.backward(q, k, v, stats, pair, jnp.zeros_like(dq), blocks)

    _with_kernel(patch, backward=backward)


def _one_query_head_of_each_group(patch):
    def backward(q, k, v, stats, *rest):
        first = (jnp.arange(q.shape[1]) % (q.shape[1] // k.shape[1]) == 0)[:, None]
        stats = stats._replace(dout=stats.dout * first[..., None], delta=stats.delta * first)
        return PLAIN.backward(q, k, v, stats, *rest)

    _with_kernel(patch, backward=backward)


# --- Sinks and dropout ------------------------------------------------------------------------------------------------


def _no_sinks(patch):
    finalize = sinks.finalize
    patch.setattr(sinks, "finalize", lambda state, sinks_H: finalize(state, None))


def _no_gradient_of_the_sinks(patch):
    patch.setattr(sinks, "gradient", lambda sinks_H, stats: jnp.zeros_like(sinks_H))


def _counted_from_0_on_each_device(axis):
    """A mutant that forgets which shard along these mesh axes a device holds."""

    def mutate(patch):
        number = context._shard_number
        patch.setattr(context, "_shard_number", lambda axes: 0 if axis in axes else number(axes))

    return mutate


def _keys_counted_from_0_in_each_shard(patch):
    def mutant(self):
        keys = dataclasses.replace(self.keys, positions=self.keys.positions % 24)
        return factor(self._replace(keys=keys))

    factor = BlockScores.dropout_factor
    patch.setattr(BlockScores, "dropout_factor", mutant)


# --- What shows -------------------------------------------------------------------------------------------------------

T, GRADIENTS = 48, NAMES[1:]
FORWARD = ("out",)
"""Of a mistake of the forward pass, for which that alone is compiled; it shows in the gradients as well."""
BASES = {
    "whole": (dict(sp=3), "zigzag", {}),
    "packed": (dict(sp=3), "zigzag", dict(segment_ids=random_segments(16, 2, T, count=2))),
    "told": (
        dict(sp=3),
        "zigzag",
        dict(
            window=5,
            intervals=ra.Intervals.blocks(np.array([[0] * 8 + [-1] * 5 + [1] * 20 + [-1] * 15, [7] * 48])),
            kv_valid=np.arange(2 * T).reshape(2, T) % 5 > 0,
            kv_bias=np.random.default_rng(4).normal(0, 2, (2, T)).astype(np.float32),
        ),
    ),
    "window": (dict(sp=3), "contiguous", dict(window=7)),
    "sinks": (dict(sp=2), "striped", dict(sinks=[0.7, -1.2, 0.1, 2.0])),
    "dropout": (dict(dp=2, sp=2, tp=2), "contiguous", dict(dropout_rate=0.3, dropout_key=jax.random.key(1))),
}
MUTANTS = {
    "rotates the wrong way": (_wrong_way, "packed", FORWARD),
    "takes the visitor for another shard": (_wrong_source, "whole", FORWARD),
    "positions of another layout": (_positions_of_another_layout, "packed", FORWARD),
    "segments do not travel": (_segments_stay_at_home, "packed", FORWARD),
    "intervals end a token early": (_off_by_one(0, -1), "told", FORWARD),
    "intervals begin a token late": (_off_by_one(1, 0), "told", FORWARD),
    "what is said of keys' validity does not travel": (_stays_at_home("real"), "told", FORWARD),
    "the bias of keys does not travel": (_stays_at_home("bias"), "told", FORWARD),
    "the count of hops for intervals is one short": (_fewer_hops, "told", FORWARD),
    "a hop is missing": (_routes(more_hops=-1), "whole", FORWARD),
    "a hop too many": (_routes(more_hops=1), "whole", FORWARD),
    "a token of a shard stays local": (_routes(window=-1), "window", FORWARD),
    "a window one token too wide": (_window(1), "window", FORWARD),
    "a window one token too narrow": (_window(-1), "window", FORWARD),
    "the count of hops is one short": (_fewer_hops, "packed", FORWARD),
    "takes the counted visitor for another shard": (_wrong_shift, "packed", FORWARD),
    "dK and dV are not sent home": (_gradients_are_not_sent_home, "packed", ("dk", "dv")),
    "hops weigh alike": (_hops_weigh_alike, "packed", FORWARD),
    "the lse in bfloat16": (_lse_in_bfloat16, "packed", GRADIENTS),
    "backward with the hop's own lse": (_lse_of_the_hop, "packed", GRADIENTS),
    "stale keys and values in the backward pass": (_stale_keys_in_the_backward_pass, "whole", GRADIENTS),
    "a hop is missing in the backward pass": (_without_a_hop_of_the_backward_pass(3), "whole", GRADIENTS),
    "the later local keys are missing in the backward pass": (
        _without_a_hop_of_the_backward_pass(1),
        "whole",
        GRADIENTS,
    ),
    "the earlier local keys are missing in the backward pass": (
        _without_a_hop_of_the_backward_pass(4),
        "whole",
        GRADIENTS,
    ),
    "dK and dV are swapped": (_dk_and_dv_swapped, "packed", ("dk", "dv")),
    "dK and dV stay behind": (_gradients_stay_behind, "whole", ("dk", "dv")),
    "dK and dV are not sent back": (_gradients_are_not_sent_back, "whole", ("dk", "dv")),
    "dQ of the last hop alone": (_dq_of_the_last_hop_alone, "packed", ("dq",)),
    "one query head of each group": (_one_query_head_of_each_group, "packed", GRADIENTS),
    "sinks are forgotten": (_no_sinks, "sinks", ALL_NAMES),
    "sinks have no gradient": (_no_gradient_of_the_sinks, "sinks", ("dsinks",)),
    "dropout counts sequences of a device": (_counted_from_0_on_each_device("dp"), "dropout", FORWARD),
    "dropout counts heads of a device": (_counted_from_0_on_each_device("tp"), "dropout", FORWARD),
    "dropout counts keys of a shard": (_keys_counted_from_0_in_each_shard, "dropout", FORWARD),
    **{f"none, {base}": (lambda patch: None, base, ()) for base in BASES},
}


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, "plain", PLAIN)
    context._sharded.cache_clear()
    yield
    context._sharded.cache_clear()


@functools.cache
def _inputs_and_bound(base):
    qkv = random_qkv(15, 2, T, 4, 2, 8)
    return qkv, Bound(qkv, **BASES[base][2])


@pytest.mark.parametrize("name", MUTANTS)
def test_ring_attention_mutants_are_seen(name, monkeypatch):
    mutate, base, wrong = MUTANTS[name]
    shape, layout, arguments = BASES[base]
    qkv, bound = _inputs_and_bound(base)
    mutate(monkeypatch)
    mesh = ra.make_mesh(**shape, devices=jax.devices()[: 8 if base == "dropout" else shape["sp"]])
    attend = sharded(mesh, layout, impl="plain")
    if wrong == FORWARD:
        got = [quickly(lambda q, k, v: attend(q, k, v, **arguments))(*qkv[:3])]
    else:
        got = results(attend, qkv, **arguments)
    assert set(bound.too_large(got)) == set(wrong)
