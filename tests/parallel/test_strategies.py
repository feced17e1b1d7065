"""Every strategy against the oracle, and what it refuses."""

import dataclasses
import functools
import itertools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import Bound, quickly, results, ring_mesh, sharded

import ring_attention as ra
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.parallel import context, ring_self_attention, sparse, ulysses
from ring_attention.parallel.all_gather import AllGather
from ring_attention.testing import NAMES, random_qkv, random_segments

P, B, T, H, K, D = 4, 2, 96, 8, 4, 6
STRIDE = 4
FOR_SPEEDS = ra.SequenceLayout.for_speeds([1.0, 0.5, 1.0, 2.0], chunks_per_shard=3)
FOR_TWO_SPEEDS = ra.SequenceLayout.for_speeds([1.0, 0.5], chunks_per_shard=3)
EVERYTHING = dict(
    window=37,
    segment_ids=random_segments(1, B, T),
    softcap=3.0,
    alibi_slopes=np.linspace(0.1, 0.8, H, dtype=np.float32),
    dropout_rate=0.2,
    dropout_key=jax.random.key(5),
    sinks=np.linspace(-1, 1, H, dtype=np.float32),
)
TOLD = dict(
    intervals=ra.Intervals.blocks(np.random.default_rng(2).integers(-1, 2, (B, T // 8)).repeat(8, 1)),
    kv_valid=np.arange(B * T).reshape(B, T) % 13 > 1,
    kv_lengths=np.array([T - 5, T // 2 + 3]),
    kv_bias=np.random.default_rng(3).normal(0, 2, (B, T)).astype(np.float32),
)
"""What is told of each token; some keys of `kv_valid` are in an interval, and so are some beyond `kv_lengths`."""
MASKS = {
    "told": EVERYTHING | TOLD,
    "causal": {},
    "bidirectional": dict(causal=False),
    "everything": EVERYTHING,
    "slopes": dict(alibi_slopes=EVERYTHING["alibi_slopes"]),
}
MANY = [name for name in ra.STRATEGIES if name != "single_device"]
LAYOUTS = ("dealt", "striped", "contiguous", "zigzag")
CANNOT = {("sliding_window", "striped"), ("sparse", "striped"), ("usp", "dealt")}


def _own_mask(strategy, mask):
    """(options of the strategy, the mask that it then computes)."""
    if strategy in ("sliding_window", "sparse"):
        mask = {name: value for name, value in mask.items() if name != "intervals"}
    if strategy == "sliding_window":
        return {}, dict(window=20) | mask
    if strategy == "sparse":
        return dict(stride=STRIDE), mask | dict(stride=STRIDE)
    if strategy == "usp":  # by itself it would be Ulysses, where there are heads enough
        return dict(ulysses_size=2), mask
    return {}, mask


@functools.cache
def _inputs(T=T, kv_heads=K, dtype="float32"):
    return random_qkv(3, B, T, H, kv_heads, D, dtype=dtype)


@functools.cache
def _bound_of(strategy, mask, *inputs):
    return Bound(_inputs(*inputs), **_own_mask(strategy, MASKS[mask])[1])


def _bound(strategy, mask, *inputs):
    """The bound for a strategy, of the ring where it computes the same mask."""
    has_own = strategy == "sparse" or (strategy == "sliding_window" and ("window" not in MASKS[mask] or mask == "told"))
    return _bound_of(strategy if has_own else "ring", mask, *inputs)


def _results(strategy, mask, layout, mesh=None, inputs=(), impl="plain", **options):
    """What the strategy makes of a mask, in natural order."""
    more, arguments = _own_mask(strategy, MASKS[mask])
    arguments = {name: value for name, value in arguments.items() if name != "stride"}
    mesh = ring_mesh(1 if strategy == "single_device" else P) if mesh is None else mesh
    if layout == "dealt":
        layout = FOR_SPEEDS if mesh.shape["sp"] == P else FOR_TWO_SPEEDS
    attend = sharded(mesh, layout, strategy=strategy, impl=impl, **more | options)
    return results(attend, _inputs(*inputs), **arguments)


# --- Exact ------------------------------------------------------------------------------------------------------------


class Situation(NamedTuple):
    """What a strategy may meet.

    Attributes:
      mask: a name in MASKS.
      T: tokens, which devices need not divide; the sparse strategy needs 90 where they do not: padded, its stride fits.
      dtype: of queries, keys and values.
      one_head: strategies that get one key/value head, which they repeat.
      mesh: sizes of the axes.
    """

    mask: str
    T: int = T
    dtype: str = "float32"
    one_head: tuple = ()
    mesh: tuple = (("sp", P),)


SITUATIONS = {
    "half": Situation("causal", dtype="bfloat16", one_head=("ulysses", "usp", "sparse")),
    "padded": Situation("bidirectional", T=75),
    "everything": Situation("everything", one_head=("all_gather", "ulysses", "usp")),
    "beside": Situation("told", mesh=(("dp", 2), ("sp", 2), ("tp", 2))),
}
"""Half precision: gradients of repeated heads must not be summed in bfloat16. Padding: what a query that sees all
must not see. All arguments, on a ring and beside other axes: dropout counts global sequences and heads, and slopes and
sinks are those of a device's heads."""


def _cases():
    for i, strategy in enumerate(MANY):
        layouts = [layout for layout in LAYOUTS if (strategy, layout) not in CANNOT]
        for j, situation in enumerate(SITUATIONS):
            yield strategy, layouts[(i + j) % len(layouts)], situation


CASES = list(_cases())
"""Each strategy in each situation and with each layout, and each layout in each situation."""


def test_cases_cover_every_pair_of_choices():
    choices = [MANY, LAYOUTS, SITUATIONS]
    for i, j in itertools.combinations(range(3), 2):
        assert {(case[i], case[j]) for case in CASES} == set(itertools.product(choices[i], choices[j])) - CANNOT


@pytest.mark.parametrize(("strategy", "layout", "situation"), CASES)
def test_strategies_are_as_exact_as_dense_attention(strategy, layout, situation):
    mask, tokens, dtype, one_head, mesh = SITUATIONS[situation]
    mesh = ra.make_mesh(**dict(mesh), devices=jax.devices()[: math.prod(size for _, size in mesh)])
    inputs = 90 if strategy == "sparse" and tokens == 75 else tokens, 1 if strategy in one_head else K, dtype
    got = _results(strategy, mask, layout, mesh, inputs)
    assert _bound(strategy, mask, *inputs).too_large(got) == {}


@pytest.mark.parametrize(
    "strategy",
    [name if name in ("ring", "all_gather") else pytest.param(name, marks=pytest.mark.slow) for name in ra.STRATEGIES],
)
def test_strategies_are_exact_with_tiles(strategy):
    blocks = ra.BlockSizes(q=8, kv=16)
    got = _results(strategy, "everything", "zigzag", impl="xla", block_sizes=blocks)
    assert _bound(strategy, "everything").too_large(got) == {}


def test_repeat_heads_sums_gradients_in_float32():
    x = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    _, vjp = jax.vjp(lambda x: ulysses.repeat_heads(x, 3), x)
    (grad,) = vjp(jnp.array([256, 0.75, 0.75], jnp.bfloat16).reshape(1, 3, 1, 1))
    assert grad.item() == 258  # 256 + 0.75 + 0.75 in bfloat16, one after the other, is 256


@pytest.mark.parametrize(
    ("strategy", "options", "kv_heads"),
    [
        pytest.param("all_gather", dict(head_groups=1), 4, marks=pytest.mark.slow),
        ("all_gather", dict(head_groups=2), 4),
        pytest.param("usp", dict(ulysses_size=1), 4, marks=pytest.mark.slow),
        pytest.param("usp", dict(ulysses_size=4), 4, marks=pytest.mark.slow),
        ("usp", dict(ulysses_size=4), 2),  # key/value heads are repeated
    ],
)
def test_strategies_are_exact_with_options(strategy, options, kv_heads):
    got = _results(strategy, "everything", "zigzag", inputs=(T, kv_heads), **options)
    assert _bound(strategy, "everything", T, kv_heads).too_large(got) == {}


@pytest.mark.parametrize("strategy", [name for name in MANY if name != "sliding_window"])
def test_strategies_run_on_one_device(strategy):
    options = dict(ulysses_size=1) if strategy == "usp" else {}
    got = _results(strategy, "causal", "zigzag", mesh=ring_mesh(1), **options)
    assert _bound(strategy, "causal").too_large(got) == {}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ra.STRATEGIES)
def test_strategies_let_no_token_see_a_later_one(strategy):
    q, k, v, _ = _inputs()
    changed = (q, k.at[:, 50].set(9.0), v.at[:, 50].set(9.0))
    mesh = ring_mesh(1 if strategy == "single_device" else P)
    options, arguments = _own_mask(strategy, {})
    arguments.pop("stride", None)
    for causal in (True, False):  # the control: without the mask it sees it
        attend = sharded(mesh, "zigzag", strategy=strategy, impl="plain", causal=causal, **options, **arguments)
        run = quickly(attend)
        before, after = (run(*qkv)[:, :50] for qkv in (_inputs()[:3], changed))
        assert bool((before == after).all()) == causal


# --- Mutants: the comparison with the oracle sees what each strategy can do wrong -------------------------------------


def _tokens_in_the_order_of_devices(patch):
    patch.setattr(ulysses.Swap, "_sort", lambda self, x, axis, order: x)


def _slopes_of_other_heads(patch):
    patch.setattr(MaskSpec, "of_heads", lambda self, start, number, of=MaskSpec.of_heads: of(self, 0, number))


def _own_gradients_alone(patch):
    def mutant(self, context, grads):
        t = grads[0].shape[2] // context.devices
        start = jax.lax.axis_index(context.axis_name) * t
        return [jax.lax.dynamic_slice_in_dim(x, start, t, axis=2) for x in grads]

    patch.setattr(AllGather, "_scatter", mutant)


def _the_same_heads_twice(patch):
    gather = AllGather._gather
    patch.setattr(AllGather, "_gather", lambda self, *args: gather(self, *args[:-1], jnp.maximum(args[-1] - 1, 0)))


def _near_tokens_twice(patch):
    pair = sparse.FarPart.pair

    def mutant(self, *args):
        found = pair(self, *args)
        mask = dataclasses.replace(found.mask, min_distance=0)
        return dataclasses.replace(found, mask=mask)

    patch.setattr(sparse.FarPart, "pair", mutant)


def _residues_of_the_next_device(patch):
    pair = sparse.FarPart.pair

    def mutant(self, *args):
        found = pair(self, *args)
        tokens = dataclasses.replace(found.keys, positions=found.keys.positions + 1)
        return dataclasses.replace(found, keys=tokens)

    patch.setattr(sparse.FarPart, "pair", mutant)


def _no_sum_over_devices(patch):
    patch.setattr(
        ring_self_attention._Circle,
        "sum_of_own",
        lambda self, x, t: jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis_name) * t, t, axis=2),
    )


def _blocks_of_the_device_before(patch):
    around = ring_self_attention._Circle.around

    def mutant(self, visit, carry, block):
        late = lambda carry, block, source: visit(carry, block, (source + 1) % self.devices)  # noqa: E731
        return around(self, late, carry, block)

    patch.setattr(ring_self_attention._Circle, "around", mutant)


MUTANTS = {
    "tokens are not sorted after a swap": (_tokens_in_the_order_of_devices, "usp", NAMES),
    "slopes of other heads": (_slopes_of_other_heads, "ulysses", NAMES),
    "slopes of other heads, gathered": (_slopes_of_other_heads, "all_gather", NAMES),
    "gradients are not summed": (_own_gradients_alone, "all_gather", ("dk", "dv")),
    "a group of heads is gathered twice": (_the_same_heads_twice, "all_gather", NAMES),
    "near tokens are seen twice": (_near_tokens_twice, "sparse", NAMES),
    "residues are one off": (_residues_of_the_next_device, "sparse", NAMES),
    "keys are not summed": (_no_sum_over_devices, "ring_self_attention", ("dk", "dv")),
    "blocks are taken for others": (_blocks_of_the_device_before, "ring_self_attention", NAMES),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_strategies_mutants_are_seen(name, monkeypatch):
    mutate, strategy, wrong = MUTANTS[name]
    mutate(monkeypatch)
    context._sharded.cache_clear()
    mask = "slopes" if name.startswith("slopes") else "causal"
    bound = _bound(strategy, mask)
    try:
        assert set(bound.too_large(_results(strategy, mask, "zigzag"))) == set(wrong)
    finally:
        context._sharded.cache_clear()


# --- What they refuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(strategy="rings"), "strategy='rings' is not known; choose one of 'all_gather', 'ring', "),
        (
            dict(strategy="single_device"),
            "strategy='single_device' needs the whole sequence on one device, but 'sp' has 4; make the mesh with sp=1",
        ),
        (dict(strategy="sliding_window"), 'strategy="sliding_window" got no window; give window=, or choose'),
        (
            dict(strategy="sliding_window", window=9, intervals=TOLD["intervals"]),
            'strategy="sliding_window" needs a bound on how far a token sees',
        ),
        (
            dict(strategy="sparse", window=(3, 4), causal=False),
            'strategy="sparse" takes no intervals, and only a window',
        ),
        (
            dict(strategy="sparse", intervals=TOLD["intervals"]),
            'strategy="sparse" takes no intervals, and only a window',
        ),
        (dict(strategy="sliding_window", window=9, layout="striped"), 'layout="striped" deals them to all devices'),
        (dict(strategy="sparse", layout="striped"), 'but layout="striped" has none; use "contiguous" or "zigzag"'),
        (
            dict(strategy="sparse", stride=6),
            "got stride=6, need a multiple of the 4 devices that divides the 24 consecutive tokens of a contiguous "
            "shard; give stride=8, or pad the sequence to 96 tokens with stride=12",
        ),
        (dict(strategy="all_gather", head_groups=3), "head_groups=3 must divide the 4 key/value heads"),
        (dict(strategy="usp", ulysses_size=3), "ulysses_size=3 must divide the 4 devices along 'sp'"),
        (dict(strategy="usp", ulysses_size=2, layout=FOR_SPEEDS), "2 of the 4 shards of a layout for devices of diff"),
    ],
)
def test_strategies_refuse_what_they_cannot_do(arguments, message):
    q, k, v, _ = _inputs()
    with pytest.raises(ValueError, match=re.escape(message)):
        ra.context_attention(q, k, v, mesh=ring_mesh(P), **arguments)


def test_ulysses_says_what_to_do_with_too_few_heads():
    q, k, v, _ = random_qkv(0, 1, 16, 6, 3, 4)
    remedy = 'use strategy="usp" with ulysses_size=2'
    with pytest.raises(ValueError, match=f"'ulysses' shares 6 query heads out among 4 devices.*{remedy}"):
        ra.context_attention(q, k, v, mesh=ring_mesh(P), strategy="ulysses")


def test_find_strategy_refuses_an_option_of_another():
    q, k, v, _ = _inputs()
    message = "got 'duplex', which is neither an argument nor an option of 'usp'; its options are ulysses_size"
    with pytest.raises(TypeError, match=message):
        ra.context_attention(q, k, v, mesh=ring_mesh(P), strategy="usp", duplex=True)
    with pytest.raises(TypeError, match="'windw'.*'single_device'; it has no options"):
        ra.context_attention(q, k, v, mesh=ring_mesh(P), strategy="single_device", windw=3)
