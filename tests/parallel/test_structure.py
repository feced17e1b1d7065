"""What the compiled programs of a ring and of a training step send and hold."""

import collections
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.attention.kernels.contract import Kernel
from ring_attention.models.config import ModelConfig
from ring_attention.parallel import hops
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.planning.hlo import compiled
from ring_attention.testing import dense_attention
from ring_attention.training.config import MeshConfig, TrainConfig
from ring_attention.training.state import abstract_state
from ring_attention.training.step import make_train_step

# T = P*t is larger than B*H*D, so that an array of t*T scores would be the largest of the program.
t, B, H, K, D = 128, 2, 6, 2, 4
BLOCKS = ra.BlockSizes(q=32, kv=32)
TOKEN = B * K * D * 4  # bytes of one token's K (or V, dK, dV) in float32; H/K times that if groups were expanded
SEGMENT = B * 4  # of its segment id
EVERYTHING = dict(window=700, packed=True, softcap=5.0, extras=("sinks", "alibi_slopes"), dropout_rate=0.1)
"""Every kind of mask and of weight at once; the window is nearly as long as the sequence on eight devices."""


class Program(NamedTuple):
    """A compiled program, and the bytes it takes between arguments and results, both of one device."""

    text: str
    temporary: int


def _mesh(P):
    return ra.make_mesh(sp=P, devices=jax.devices()[:P])


def _trace(part, P, shard=t, head_dim=D, dtype="float32", packed=False, extras=(), **settings):
    """The forward pass traced from shapes, or the backward pass alone, its residuals being arguments.

    `packed` gives segment ids, `extras` names arguments that hold a number for each head.
    """
    settings = dict(mesh=_mesh(P), layout="zigzag", block_sizes=BLOCKS) | settings
    if "dropout_rate" in settings:
        settings["dropout_key"] = jax.random.key(0)
    by_token = NamedSharding(settings["mesh"], Spec(None, "sp"))
    q, k = (jax.ShapeDtypeStruct((B, P * shard, heads, head_dim), dtype, sharding=by_token) for heads in (H, K))
    segments = jax.ShapeDtypeStruct((B, P * shard), "int32", sharding=by_token) if packed else None
    of_heads = {name: jax.ShapeDtypeStruct((H,), "float32") for name in extras}

    def forward(segment_ids, q, k, v, of_heads):
        return ra.ring_attention(q, k, v, segment_ids=segment_ids, **of_heads, **settings)

    if part == "forward":
        return jax.jit(forward).trace(segments, q, k, k, of_heads)
    pull = lambda segment_ids, *args: jax.vjp(functools.partial(forward, segment_ids), *args)[1]  # noqa: E731
    vjp = jax.eval_shape(pull, segments, q, k, k, of_heads)
    return jax.jit(lambda vjp, dout: vjp(dout)).trace(vjp, q)


@functools.cache
def _program(part, P, **settings):
    executable = _trace(part, P, **settings).lower().compile()
    return Program(executable.as_text(), executable.memory_analysis().temp_size_in_bytes)


def _totals(part, P, **settings):
    return compiled.totals(_program(part, P, **settings).text)


def _permutes(number, size):
    """The totals of a program that permutes and does nothing else that takes two devices."""
    return {"collective-permute": (number, size)} if number else {}


# --- What is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("P", [2, 4, 8])
def test_forward_sends_keys_and_values_once_and_nothing_else(P):
    everything = 2 * P * t * TOKEN  # K and V of all devices
    assert _totals("forward", P) == _permutes(2 * (P - 1), (P - 1) * everything // P)


@pytest.mark.parametrize("P", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_backward_sends_keys_values_and_gradients_as_often(P):
    number, size = 2 * (P - 1), 2 * (P - 1) * t * TOKEN
    assert _totals("backward", P) == _permutes(2 * number, 2 * size)


@pytest.mark.usefixtures("quick")
def test_forward_sends_segment_ids_with_the_keys():
    kv, segments, settings = 2 * 3 * t * TOKEN, 3 * t * SEGMENT, dict(packed=True, impl="quick")
    forward, backward = (_totals(part, 4, **settings) for part in ("forward", "backward"))
    assert forward.pop("all-gather")[1] + forward.pop("all-reduce")[1] < 0.1 * kv  # of bounds: hops are counted
    assert forward == _permutes(9, kv + segments)
    assert backward == _permutes(15, 2 * kv + segments)


@pytest.mark.slow
@pytest.mark.nightly
def test_unrolled_ring_sends_the_same_without_a_loop():
    def at_once(part, **settings):
        """Permutes in the text that stand in no loop."""
        return sum(item.runs == 1 for item in compiled.collectives(_program(part, 8, **settings).text))

    for part, number in (("forward", 14), ("backward", 28)):
        assert _totals(part, 8, unroll=True) == _totals(part, 8)
        assert at_once(part, unroll=True) == number
        assert at_once(part) < number


def test_program_of_a_ring_does_not_grow_with_its_size():
    for part in ("forward", "backward"):
        four, eight = (compiled.collectives(_program(part, P).text) for P in (4, 8))
        assert [item.arrays for item in eight] == [item.arrays for item in four]
        assert max(item.runs for item in eight) > max(item.runs for item in four)


@pytest.mark.slow
def test_ring_sends_no_sinks_slopes_softcap_or_dropout():
    plain = _totals("forward", 4)
    assert _totals("forward", 4, extras=("sinks", "alibi_slopes"), softcap=5.0, dropout_rate=0.1) == plain
    assert _totals("backward", 4, extras=("alibi_slopes",), softcap=5.0, dropout_rate=0.1) == _totals("backward", 4)


@pytest.mark.usefixtures("quick")
def test_sinks_gradient_is_the_only_sum_over_devices():
    summed = _totals("backward", 4, extras=("sinks",), impl="quick")
    assert summed == _totals("backward", 4) | {"all-reduce": (1, H * 4)}


def _asked(jaxpr):
    """dtype -> (number, bytes) of what our code sends, before the CPU's compiler turns bfloat16 into float32."""
    total = collections.defaultdict(lambda: (0, 0))

    def add(dtype, number, size):
        total[dtype] = (total[dtype][0] + number, total[dtype][1] + size)

    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "ppermute":
            for x in eqn.invars:
                add(x.aval.dtype.name, 1, x.aval.size * x.aval.dtype.itemsize)
        is_jaxpr = lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))  # noqa: E731
        for inner in filter(is_jaxpr, jax.tree.leaves(eqn.params, is_leaf=is_jaxpr)):
            planned = re.search(r"planned_(\d+)$", str(eqn.source_info.name_stack))  # where hops are counted
            times = int(planned[1]) if planned and eqn.primitive.name == "while" else eqn.params.get("length", 1)
            for dtype, (number, size) in _asked(inner).items():
                add(dtype, times * number, times * size)
    return dict(total)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ring_sends_half_precision_and_float32_gradients(dtype):
    half = (14, 14 * t * TOKEN // 2)
    assert _asked(_trace("forward", 8, dtype=dtype).jaxpr) == {dtype: half}
    assert _asked(_trace("backward", 8, dtype=dtype, packed=True).jaxpr) == {
        dtype: half,
        "float32": (14, 14 * t * TOKEN),
        "int32": (7, 7 * t * SEGMENT),
    }


# --- What a window spares, and which way things go --------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """A kernel that uses all it is given and computes next to nothing, so that many rings compile in little time."""

    def total(k, v, pair):
        segments = () if pair.keys.segments is None else (pair.keys.segments,)
        return sum(x.astype(jnp.float32).sum() for x in (k, v, *segments))

    def forward(q, k, v, pair, state, blocks):
        return jax.tree.map(lambda x: x + total(k, v, pair), state)

    def backward(q, k, v, stats, pair, dq, blocks):
        here = total(k, v, pair)
        return dq + here, *(x.astype(jnp.float32) * here for x in (k, v))

    monkeypatch.setitem(kernels.KERNELS, "quick", Kernel("quick", forward, backward))


def _fewest(layout, P, reach, causal=True):
    """(transfers, tokens sent) of the keys in one pass: the fewest that can do, found token by token.

    Every device runs the same program, so a token of a shard goes as far as that token of any shard is needed. What
    goes equally far in both directions from neighbouring places in a shard is sent together.
    """
    position = ra.SequenceLayout(layout, P).positions(P * t).reshape(P, t)
    ways = []
    for token in range(t):
        needed = set()
        for source in range(P):
            ahead = position - position[source, token]  # [device, query]
            sees = (np.abs(ahead) < reach) & ((ahead >= 0) | (not causal))
            needed |= {(device - source) % P for device in np.flatnonzero(sees.any(1))}
        shifts = sorted(needed - {0})
        splits = [(shifts[:n], shifts[n:]) for n in range(len(shifts) + 1)]
        options = [(max(forth, default=0), P - min(back, default=P)) for forth, back in splits]
        ways.append(min(options, key=lambda way: (sum(way), way[1])))
    together = [way for way, before in zip(ways, [None, *ways[:-1]], strict=True) if way != before]
    return sum(map(sum, together)), sum(map(sum, ways))


def test_fewest_transfers_are_those_counted_by_hand():
    assert _fewest("contiguous", 4, 33) == (1, 32)  # the last 32 tokens of each shard, one hop
    assert _fewest("contiguous", 4, t + 1) == (1, t)
    assert _fewest("contiguous", 4, 200) == (3, 199)  # 57 tokens one hop, the last 71 two
    assert _fewest("contiguous", 4, 33, causal=False) == (2, 64)
    assert _fewest("zigzag", 4, 33) == (2, 64)  # the ends of both chunks, one forth and one back
    assert _fewest("zigzag", 4, 33, causal=False) == (3, 128)  # the two chunks' ends in the middle go together
    assert _fewest("striped", 4, 3) == (2, 2 * t)  # neighbours live on neighbouring devices
    assert _fewest("striped", 4, 4) == (3, 3 * t)  # no less than without a window
    for layout in LAYOUT_KINDS:
        assert _fewest(layout, 4, 4 * t) == (3, 3 * t)
        assert _fewest(layout, 4, 1) == (0, 0)


WINDOWS = [1, 2, 4, 33, 100, t + 1, t + 2, 200]


def _asked_by(part, P, **settings):
    """dtype -> (number, bytes) of what a pass of ours sends, read from its trace."""
    return _asked(_trace(part, P, **settings).jaxpr)


def _transfers(number, tokens, segments=0):
    """What is asked for where so many transfers of keys, and of as many values, send so many tokens of each.

    `segments` is the number of transfers of segment ids, which go no farther than keys.
    """
    asked = {"float32": (2 * number, 2 * tokens * TOKEN)} if number else {}
    return asked | ({"int32": (segments, tokens * SEGMENT)} if segments else {})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("causal", [pytest.param(True, id="causal"), pytest.param(False, id="bidirectional")])
@pytest.mark.parametrize("layout", LAYOUT_KINDS)
def test_window_leaves_the_fewest_transfers(layout, causal):
    for window in WINDOWS:
        settings = dict(layout=layout, causal=causal, window=window, impl="quick")
        number, tokens = _fewest(layout, 4, window, causal)
        assert _asked_by("forward", 4, **settings) == _transfers(number, tokens), window
        assert _asked_by("backward", 4, **settings) == _transfers(2 * number, 2 * tokens), window


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("layout", LAYOUT_KINDS)
def test_max_segment_len_leaves_the_fewest_transfers(layout):
    for longest in (2, 33, 100, 200):
        settings = dict(layout=layout, max_segment_len=longest, packed=True, impl="quick")
        number, tokens = _fewest(layout, 8, longest)
        asked = _transfers(number, tokens, segments=number)
        assert _asked_by("forward", 8, **settings) == asked, longest
        backward = asked | _transfers(2 * number, 2 * tokens)
        assert _asked_by("backward", 8, **settings) == backward, longest


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("layout", "bound"), [("contiguous", "max_segment_len"), ("zigzag", "window"), ("striped", "max_segment_len")]
)
def test_window_and_longest_segment_send_what_was_asked_for(layout, bound):
    """The compiler adds nothing to what is asked for, and finds nothing in it to leave out."""
    settings = dict(layout=layout, packed=True, impl="quick") | {bound: 100}
    for part in ("forward", "backward"):
        asked = _asked_by(part, 4, **settings).values()
        assert _totals(part, 4, **settings) == _permutes(*map(sum, zip(*asked, strict=True)))


@pytest.mark.parametrize(("layout", "number"), [pytest.param("contiguous", 1, marks=pytest.mark.slow), ("zigzag", 2)])
def test_window_sends_nothing_else_with_tiles(layout, number):
    sent = number * 32 * TOKEN
    assert _totals("forward", 8, layout=layout, window=33) == _permutes(2 * number, 2 * sent)
    assert _asked_by("backward", 8, layout=layout, window=33) == {"float32": (4 * number, 4 * sent)}


def _bytes_by_direction(text):
    """(bytes sent to the next device, bytes sent to the one before), by the pairs of the compiled permutes."""
    pairs = [
        [int(device) for device in found]
        for found in re.findall(r" collective-permute(?:-start)?\(.*source_target_pairs=\{\{(\d+),(\d+)\}", text)
    ]
    permutes = [item for item in compiled.collectives(text) if item.kind == "collective-permute"]
    sizes = collections.Counter()
    for (source, target), item in zip(pairs, permutes, strict=True):
        sizes[(target - source) % 8] += item.bytes
    assert sizes.keys() <= {1, 7}  # of eight devices
    return sizes[1], sizes[7]


@pytest.mark.parametrize(("layout", "part"), [("contiguous", "forward"), ("zigzag", "backward")])
@pytest.mark.usefixtures("quick")
def test_duplex_ring_sends_half_the_bytes_each_way(part, layout):
    settings = dict(layout=layout, impl="quick")
    plain, duplex = (_program(part, 8, duplex=duplex, **settings).text for duplex in (False, True))
    (forth, back), (number, size) = _bytes_by_direction(plain), compiled.totals(plain)["collective-permute"]
    assert (forth, back) == (size, 0)
    assert _bytes_by_direction(duplex) == (size // 2, size // 2)
    assert compiled.totals(duplex) == _permutes(2 * number, size)


@pytest.mark.slow
def test_duplex_ring_sends_nothing_else_with_tiles():
    assert _totals("forward", 8, duplex=True) == _permutes(28, 14 * t * TOKEN)
    assert _bytes_by_direction(_program("forward", 8, duplex=True).text) == (7 * t * TOKEN, 7 * t * TOKEN)


# --- What is held -----------------------------------------------------------------------------------------------------


@functools.cache
def _gathering_program(P):
    """The control: dense attention of a shard's queries to all keys."""

    def attend(q, k, v):
        k, v = (lax.all_gather(x, "sp", axis=1, tiled=True) for x in (k, v))
        return dense_attention(q, k, v, causal=False)

    spec = Spec(None, "sp")
    attend = jax.shard_map(attend, mesh=_mesh(P), in_specs=(spec,) * 3, out_specs=spec)
    sharding = NamedSharding(_mesh(P), spec)
    q, k = (jax.ShapeDtypeStruct((B, P * t, heads, D), "float32", sharding=sharding) for heads in (H, K))
    executable = jax.jit(attend).lower(q, k, k).compile()
    return Program(executable.as_text(), executable.memory_analysis().temp_size_in_bytes)


@pytest.mark.slow
def test_program_holds_no_array_of_queries_times_all_keys(monkeypatch):
    monkeypatch.setattr(hops, "PIECES", 8)  # whose bounds all devices compare: no more, however long t is

    def widest(text):
        return max(array.size for array in compiled.arrays(text))

    scores, tiles = t * 8 * t, ra.BlockSizes(q=t // 2, kv=t // 2)  # of a device, and less than it has of each
    for part in ("forward", "backward"):
        assert widest(_program(part, 8, block_sizes=tiles).text) < scores / 8
        assert widest(_program(part, 8, block_sizes=tiles, **EVERYTHING).text) < scores / 8
    control = _gathering_program(8).text
    assert widest(control) >= scores
    assert "all-gather" in compiled.totals(control)


def test_ring_with_every_mask_sends_no_mask():
    number, tokens = _fewest("zigzag", 8, EVERYTHING["window"])
    assert _asked_by("forward", 8, **EVERYTHING) == _transfers(number, tokens, segments=number)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_memory_depends_on_the_shard_alone(part):
    two, four, eight = (_program(part, P).temporary for P in (2, 4, 8))
    assert four == pytest.approx(eight, rel=0.1)
    assert two < 1.1 * four  # two devices need no loop, and less memory
    assert _gathering_program(8).temporary > 1.3 * eight  # the control: a program that holds the keys of all devices


@pytest.mark.slow
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_memory_is_proportional_to_the_shard(part):
    def memory(shard, tile):
        blocks = ra.BlockSizes(q=tile, kv=tile)
        return _program(part, 4, shard=shard, head_dim=32, block_sizes=blocks).temporary

    one, two = memory(4096, 256), memory(8192, 256)
    assert 1.8 * one < two < 2.1 * one
    assert memory(1024, 1024) > 2.5 * memory(512, 512)  # the control: tiles that grow with the shard


# --- A training step --------------------------------------------------------------------------------------------------

SEQ_LEN, LAYERS = 208, 2  # neither the length nor the number of tokens is the size of a weight


@functools.cache
def _compiled_step(remat, **shape):
    model = ModelConfig(
        vocab_size=64,
        num_layers=LAYERS,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        remat=remat,
    )
    config = TrainConfig(
        name="structure", model=model, seq_len=SEQ_LEN, num_steps=200, batch_size=2, mesh=MeshConfig(**shape)
    )
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    field = jax.ShapeDtypeStruct((2, SEQ_LEN), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids", "loss_mask"), field)
    step = make_train_step(config, ra.make_mesh(**shape, devices=devices))
    return step.lower(abstract_state(config), batch).compile().as_text()


def _ring_permutes(text):
    """Runs of permutes of floating-point blocks: keys, values and their gradients, not segment ids."""
    found = compiled.collectives(text)
    return sum(item.runs for item in found if item.kind == "collective-permute" and item.arrays[0].dtype == "f32")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [dict(sp=8), dict(fsdp=2, sp=2, tp=2)], ids=str)
def test_train_step_runs_each_ring_once_and_gathers_nothing(shape):
    text, P = _compiled_step("attention", **shape), shape["sp"]
    found = compiled.collectives(text)
    gathered = {size for item in found if item.kind == "all-gather" for array in item.arrays for size in array.shape}
    assert gathered  # weights are
    assert gathered.isdisjoint({SEQ_LEN, 2 * SEQ_LEN})
    assert {item.kind for item in found} == {"all-gather", "all-reduce", "reduce-scatter", "collective-permute"}
    assert _ring_permutes(text) == LAYERS * (2 * (P - 1) + 4 * (P - 1))


@pytest.mark.slow
def test_remat_attention_runs_no_ring_twice_full_does():
    P, permutes = 8, {remat: _ring_permutes(_compiled_step(remat, sp=8)) for remat in ("attention", "full")}
    assert permutes["attention"] == LAYERS * (2 * (P - 1) + 4 * (P - 1))
    # the first hop of the forward ring that runs again stands in no loop: the compiler lets it serve the backward too
    assert permutes["full"] == permutes["attention"] + LAYERS * 2 * (P - 2)


@pytest.mark.parametrize("window", [None, 3 * t // 2])
def test_gradients_return_to_their_tokens_without_a_scatter(window):
    """A scatter to all tokens passes an empty index, at which jaxlib 0.11.2 ends in a segmentation fault."""
    assert "scatter" not in str(_trace("backward", 4, window=window, impl="plain").jaxpr)
    assert "scatter" in str(jax.make_jaxpr(lambda x: x.at[:, :t].add(x))(jnp.ones((1, t))))
