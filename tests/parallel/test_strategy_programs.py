"""What the strategies say of themselves, and what their compiled programs send and hold."""

import functools

import jax
import pytest
from ring_helpers import ring_mesh

import ring_attention as ra
from ring_attention.parallel.hops import PIECES
from ring_attention.parallel.strategies import find_strategy
from ring_attention.parallel.strategy import Strategy
from ring_attention.parallel.workload import Workload
from ring_attention.planning.hlo import compiled

P, B, T, H, K, D = 4, 2, 96, 8, 4, 6
STRIDE = 4
OPTIONS = {"sparse": dict(stride=STRIDE), "usp": dict(ulysses_size=2)}
MANY = [name for name in ra.STRATEGIES if name != "single_device"]


def test_strategies_state_their_facts():
    assert set(ra.STRATEGIES) == {
        "single_device",
        "all_gather",
        "sparse",
        "sliding_window",
        "ring_self_attention",
        "ring",
        "ulysses",
        "usp",
    }
    for name, strategy in ra.STRATEGIES.items():
        assert isinstance(strategy, Strategy)
        assert strategy.name == name
        assert strategy.exact == (name != "sparse")
        assert strategy.full == (name not in ("sparse", "sliding_window"))
        assert strategy.memory
        assert strategy.communication
        assert strategy.source
        work = Workload(seq_len=4096, devices=8, heads=8, kv_heads=8, head_dim=16, window=256)
        assert strategy.memory_bytes(work) > 0
        assert (strategy.sent_bytes(work) > 0) == (name != "single_device")


class _Program:
    """Forward or backward pass of a strategy, compiled from shapes; the backward's residuals are arguments."""

    def __init__(self, part, strategy, tokens=T, devices=P, packed=False, **arguments):
        by_token = jax.NamedSharding(mesh := ring_mesh(devices), jax.P(None, "sp"))
        of = lambda dtype, *rest: jax.ShapeDtypeStruct((B, tokens, *rest), dtype, sharding=by_token)  # noqa: E731
        q, k, segments = of("float32", H, D), of("float32", K, D), of("int32") if packed else None
        arguments = dict(mesh=mesh, strategy=strategy, impl="xla", block_sizes=ra.BlockSizes(q=8, kv=8)) | arguments

        def attend(segment_ids, q, k, v):
            return ra.context_attention(q, k, v, segment_ids=segment_ids, **arguments)

        if part == "forward":
            lowered = jax.jit(attend).lower(segments, q, k, k)
        else:
            pull = lambda segments, *qkv: jax.vjp(functools.partial(attend, segments), *qkv)[1]  # noqa: E731
            vjp = jax.eval_shape(pull, segments, q, k, k)
            lowered = jax.jit(lambda vjp, dout: vjp(dout)).lower(vjp, q)
        executable = lowered.compile()
        self.text = executable.as_text()
        self.temporary = executable.memory_analysis().temp_size_in_bytes


PERMUTE, GATHER, SCATTER, SWAP, SUM = (
    "collective-permute",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "all-reduce",
)
PROGRAMS = [
    # strategy, options, window, collectives forward, collectives backward
    ("all_gather", {}, None, {GATHER: 2 * K}, {GATHER: 2 * K, SCATTER: 2 * K}),
    ("all_gather", dict(head_groups=1), None, {GATHER: 2}, {GATHER: 2, SCATTER: 2}),
    ("ring_self_attention", {}, None, {PERMUTE: 6}, {PERMUTE: 6, SUM: 1}),
    ("ring", {}, None, {PERMUTE: 6}, {PERMUTE: 12}),
    ("ring", {}, 20, {PERMUTE: 2}, {PERMUTE: 4}),
    ("sliding_window", {}, 20, {PERMUTE: 2}, {PERMUTE: 4}),
    ("ulysses", {}, None, {SWAP: 4}, {SWAP: 4}),
    ("usp", dict(ulysses_size=2), None, {SWAP: 4, PERMUTE: 2}, {SWAP: 4, PERMUTE: 4}),
    ("sparse", dict(stride=STRIDE), None, {SWAP: 5, PERMUTE: 2}, {SWAP: 9, PERMUTE: 4}),
]


@pytest.mark.parametrize(("strategy", "options", "window", "forward", "backward"), PROGRAMS)
def test_sent_bytes_are_those_of_the_program(strategy, options, window, forward, backward):
    work = Workload(seq_len=T, devices=P, heads=H, kv_heads=K, head_dim=D, batch=B, itemsize=4, window=window)
    for part, kinds in (("forward", forward), ("backward", backward)):
        text = _Program(part, strategy, window=window, impl="plain", **options).text
        assert {kind: runs for kind, (runs, _) in compiled.totals(text).items()} == kinds
        assert compiled.sent(text) == find_strategy(strategy, options).sent_bytes(work, backward=part == "backward")


@pytest.mark.parametrize("strategy", ["all_gather", "ring_self_attention", "ring", "ulysses", "usp", "sparse"])
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_sent_bytes_count_segment_ids(part, strategy):
    options = OPTIONS.get(strategy, {})
    work = Workload(seq_len=T, devices=P, heads=H, kv_heads=K, head_dim=D, batch=B, itemsize=4, segments=True)
    items = compiled.collectives(_Program(part, strategy, packed=True, impl="plain", **options).text)
    # A ring that counts its hops tells all devices between which bounds its tokens lie: a few numbers.
    counts = ("all-gather", "all-reduce") if strategy in ("ring", "usp") else ()
    counting = sum(item.sent for item in items if item.kind in counts)
    assert counting <= 4 * P * (1 + 4 * B * PIECES)
    sent = sum(item.sent for item in items) - counting
    assert sent == find_strategy(strategy, options).sent_bytes(work, backward=part == "backward")


TOKENS = 1024


@functools.cache
def _temporary(strategy, **settings):
    return _Program("forward", strategy, tokens=TOKENS, **settings).temporary


@pytest.mark.parametrize(
    ("strategy", "window"),
    [*((name, 20 if name == "sliding_window" else None) for name in MANY), ("ring", 20)],
)
def test_memory_bytes_are_about_those_of_the_program(strategy, window):
    """The largest arrays of the program, but not its scratch: the CPU's takes up to four times as much."""
    options = OPTIONS.get(strategy, {})
    work = Workload(seq_len=TOKENS, devices=P, heads=H, kv_heads=K, head_dim=D, batch=B, itemsize=4, window=window)
    temporary = _temporary(strategy, window=window, **options)
    stated = find_strategy(strategy, options).memory_bytes(work)
    assert stated <= 1.2 * temporary
    assert temporary < 4 * stated


def test_all_gather_by_heads_bounds_memory():
    assert find_strategy("all_gather", {}).head_groups is None  # a group for each key/value head
    whole, by_heads = _temporary("all_gather", window=None, head_groups=1), _temporary("all_gather", window=None)
    gathered = 2 * B * TOKENS * K * D * 4
    assert whole > gathered
    assert by_heads < whole - gathered / 4


@pytest.mark.slow
def test_memory_grows_with_the_sequence_only_where_it_must():
    """Twice the devices and tokens, the same shard: a ring stays as it is, rows of scores and gathered keys grow."""

    def growth(strategy):
        small, large = (_Program("forward", strategy, 128 * n, n).temporary for n in (4, 8))
        return large / small

    assert growth("ring") < 1.1
    assert growth("ring_self_attention") > 1.7
    assert growth("all_gather") > 1.2
