"""Random calls of the public functions: each gives the oracle's value, or one line that names argument and remedy.

  API_FUZZ_CALLS=300 API_FUZZ_SEED=1 pytest -n 0 tests/test_api_fuzz.py  # more of them, and others

Most calls have one argument that is odd: of another type, shape or dtype, out of range, or of no meaning. What is odd
may still be allowed; then the value must be right.
"""

import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import ring_attention as ra

CALLS, SEED = (int(os.environ.get(f"API_FUZZ_{name}", default)) for name, default in (("CALLS", 60), ("SEED", 0)))
GOOD = 0.08
"""Share of the calls without an odd argument: each may compile a program."""

B, T, H, K, D = 2, 16, 4, 2, 8
TOLERANCE = dict(float32=2e-5, bfloat16=3e-2, float16=4e-3)

ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 3, 1.5, -0.5, 2**31, 2**40, -(2**31), float("nan"), float("inf"), 1j),
    *("", "sp", "ring", "zigzag", "xla", b"x", "two\nlines", [], [1, 2], (), (1, 2), {}, {"a": 1}, object(), int, len),
    *(np.float32(2), np.int64(3), np.array(3), np.array([1, 2]), np.zeros((0,)), np.array(["a"]), np.array([None])),
]
ODD_ARRAYS = dict(
    cast=lambda x, rng: x.astype(rng.choice(["int32", "float16", "bool", "complex64", "uint8"])),
    wide=lambda x, rng: np.asarray(x).astype(rng.choice(["float64", "int64", "object", "str"])),
    flat=lambda x, rng: x.reshape(-1),
    deeper=lambda x, rng: x[None],
    shorter=lambda x, rng: x[tuple(slice(0, n - (axis == rng.integers(x.ndim))) for axis, n in enumerate(x.shape))],
    empty=lambda x, rng: x[:0],
    longer=lambda x, rng: jnp.concatenate([x, x], rng.integers(x.ndim)),
    turned=lambda x, rng: jnp.swapaxes(x, 0, x.ndim - 1),
    listed=lambda x, rng: np.asarray(x).tolist(),
    numpy=lambda x, rng: np.asarray(x),
    opposite=lambda x, rng: -x,
)


class Call(NamedTuple):
    """A call that may be made.

    Attributes:
      name: of the function.
      function: takes the arguments by name.
      arguments: those that may become odd.
      want: the oracle's value for these arguments, in the order of the result.
    """

    name: str
    function: object
    arguments: dict
    want: object


def _qkv(rng) -> dict:
    dtype = rng.choice(["float32", "float32", "bfloat16"])
    shapes = dict(q=(B, T, H, D), k=(B, T, K, D), v=(B, T, K, D))
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def _rule(rng) -> dict:
    """One of few, so that programs are used again; all of them are given, so that any may become odd."""
    few = [{}, dict(window=5), dict(causal=False, softcap=3.0)]
    return dict(causal=True, window=None, softcap=None, scale=None) | few[rng.integers(len(few))]


def _of_heads(rng) -> dict:
    of_heads = dict(sinks=jnp.asarray(rng.standard_normal(H), "float32"), alibi_slopes=jnp.full(H, 0.5))
    return of_heads if rng.integers(2) else dict.fromkeys(of_heads)


def _segments(rng):
    return jnp.asarray(np.sort(rng.integers(1, 4, (B, T)), axis=1), jnp.int32) if rng.integers(2) else None


def _mesh(P: int):
    return ra.make_mesh(sp=P, devices=jax.devices()[:P])


def _oracle(arguments: dict, layout=None, **more) -> np.ndarray:
    """The oracle's value for the arguments that are its own; in the order of `layout`, if there is one."""
    own = ("q", "k", "v", "causal", "window", "segment_ids", "kv_segment_ids", "q_positions", "kv_positions")
    own += ("softcap", "scale", "sinks", "alibi_slopes")
    arguments = {name: arguments[name] for name in own if name in arguments} | more
    order = ra.SequenceLayout("contiguous", 1) if layout is None else layout
    dealt = [name for name in ("q", "k", "v", "segment_ids") if arguments.get(name) is not None]
    natural = {name: order.unpermute(np.asarray(arguments[name]), 1) for name in dealt}
    return order.permute(ra.reference_attention(**(arguments | natural)), 1)


def _layout_of(arguments: dict, P: int):
    layout = arguments["layout"]
    return ra.SequenceLayout(layout, P) if isinstance(layout, str) else layout


def _sharded(rng, P: int) -> dict:
    layout = rng.choice(["contiguous", "zigzag", "striped"]).item()
    return dict(
        **(_qkv(rng) | _rule(rng) | _of_heads(rng)),
        **dict(
            segment_ids=_segments(rng), max_segment_len=None, layout=layout, mesh=_mesh(P), axis_name="sp", spec=None
        ),
        **dict(dropout_rate=0.0, dropout_key=None, impl="auto", block_sizes=None),
    )


def _ring(rng) -> Call:
    arguments = _sharded(rng, 2) | dict(duplex=False, unroll=False)
    return Call("ring_attention", ra.ring_attention, arguments, lambda a: _oracle(_bounded(a), _layout_of(a, 2)))


def _bounded(arguments: dict) -> dict:
    """Where both bound the distance, the shorter does."""
    bounds = [arguments[name] for name in ("window", "max_segment_len") if arguments[name] is not None]
    return arguments | dict(window=min(bounds, default=None))


def _context(rng) -> Call:
    strategy = rng.choice(list(ra.STRATEGIES)).item()
    P = 1 if strategy == "single_device" else 2
    arguments = _sharded(rng, P) | dict(strategy=strategy)
    if strategy == "sparse":
        arguments |= dict(layout="contiguous", stride=4)
    if strategy == "sliding_window":
        arguments |= dict(layout="contiguous", window=5)

    def want(a):
        return _oracle(_bounded(a), _layout_of(a, P), **({"stride": a["stride"]} if strategy == "sparse" else {}))

    return Call("context_attention", ra.context_attention, arguments, want)


def _blockwise(rng) -> Call:
    others = dict(segment_ids=_segments(rng), kv_segment_ids=None, q_positions=None, kv_positions=None)
    others |= dict(dropout_rate=0.0, dropout_key=None, impl="auto", block_sizes=None)
    arguments = _qkv(rng) | _rule(rng) | _of_heads(rng) | others
    return Call("blockwise_attention", ra.blockwise_attention, arguments, _oracle)


def _decode(rng) -> Call:
    rule = {name: value for name, value in _rule(rng).items() if name != "causal"}
    arrays = _qkv(rng)
    caches = dict(q=arrays["q"][:, :1], k_cache=arrays["k"], v_cache=arrays["v"])
    of_cache = dict(lengths=jnp.asarray(rng.integers(1, T + 1, B), jnp.int32), layout="striped", heads_first=False)
    others = dict(mesh=_mesh(2), axis_name="sp", spec=None, impl="auto", block_sizes=None)

    def want(a):
        k, v = (_layout_of(a, 2).unpermute(np.asarray(a[name]), 1) for name in ("k_cache", "v_cache"))
        positions = np.asarray(a["lengths"])[:, None] - a["q"].shape[1] + np.arange(a["q"].shape[1])
        return _oracle({**a, "k": k, "v": v}, causal=True, q_positions=positions)

    return Call("decode_attention", ra.decode_attention, caches | rule | _of_heads(rng) | of_cache | others, want)


def _flax(rng) -> Call:
    arguments = _sharded(rng, 2)
    settings = [name for name in arguments if name not in ("q", "k", "v", "dropout_rate", "dropout_key")]
    of_layer = dict(mask=None, bias=None, dropout_rate=0.0, dropout_rng=None, deterministic=False, dtype=None)
    of_layer |= dict(precision=None, broadcast_dropout=True, is_causal=False)
    arguments = {name: arguments[name] for name in ("q", "k", "v", *settings)} | of_layer

    def function(q, k, v, **given):
        attention_fn = ra.flax_attention_fn(**{name: given.pop(name) for name in settings})
        return attention_fn(q, k, v, **given)

    return Call("flax_attention_fn", function, arguments, lambda a: _oracle(_bounded(a), _layout_of(a, 2)))


def _reference(rng) -> Call:
    arguments = _qkv(rng) | _rule(rng) | _of_heads(rng) | dict(segment_ids=_segments(rng), stride=None)
    return Call("reference_attention", ra.reference_attention, arguments, None)


MAKERS = (_ring, _context, _blockwise, _decode, _flax, _reference)


def _made(number: int) -> tuple[Call, str | None]:
    """Call number so many, and the name of the argument that is odd."""
    rng = np.random.default_rng([SEED, number])
    call = MAKERS[rng.integers(len(MAKERS))](rng)
    if rng.random() < GOOD:
        return call, None
    name = rng.choice(sorted(call.arguments)).item()
    value = call.arguments[name]
    if hasattr(value, "ndim") and rng.integers(2):
        kinds = sorted(ODD_ARRAYS)
        odd = ODD_ARRAYS[kinds[rng.integers(len(kinds))]](value, rng)
    else:
        odd = [*ODD_VALUES, PartitionSpec("sp"), PartitionSpec(None, "sp", None, None, None), ra.BlockSizes(q=8, kv=8)]
        odd = odd[rng.integers(len(odd))]
    return call._replace(arguments=call.arguments | {name: odd}), name


def _fault(call: Call, odd: str | None) -> str | None:
    """What is wrong with how a call ends; None if nothing is."""
    try:
        got = call.function(**call.arguments)
    except ValueError as error:
        return _fault_of_words(str(error), odd)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    if call.want is None:
        return None
    got = np.asarray(got).astype(np.float64)
    try:
        want = call.want(call.arguments)
    except Exception as error:  # it took what the oracle refuses
        return f"gave a value, but the oracle {type(error).__name__}: {str(error)[:300]}"
    if got.shape != want.shape:
        return f"gave {got.shape}, need {want.shape}"
    dtype = str(jnp.asarray(call.arguments["q"]).dtype)
    wrong = np.abs(got - want).max(initial=0) / max(1.0, np.abs(want).max(initial=0))
    return None if wrong <= TOLERANCE[dtype] else f"is off by {wrong}"


def _fault_of_words(words: str, odd: str | None) -> str | None:
    if odd is None:
        return f"a good call is refused: {words}"
    # k and v are compared with q, so that any of them may be named; a cache is called so by its attention.
    names = {odd, odd.replace("_", " "), *(("q", "k", "v") if odd in "qkv" or odd.endswith("cache") else ())}
    names |= {"the cache"} if odd.endswith("cache") else {"k", "v"} if odd == "q" else set()
    if "\n" in words:
        return f"more than one line: {words!r}"
    if not any(re.search(rf"\b{re.escape(name)}\b", words) for name in names):
        return f"does not name {odd}: {words}"
    return None if ";" in words else f"has no remedy: {words}"


def test_every_call_gives_the_oracles_value_or_one_line_that_names_argument_and_remedy():
    faults = []
    for number in range(CALLS):
        call, odd = _made(number)
        fault = _fault(call, odd)
        if fault is not None:
            given = "" if odd is None else f"{odd}={repr(call.arguments[odd])[:200]}"
            faults.append(f"seed {SEED}, number {number}: {call.name}({given}) {fault}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: q + 1, "is off by"),
        (lambda q: q[:, 1:], "gave"),
        (lambda q: int("x"), "does not name"),
        (lambda q: q.nothing, "AttributeError"),
        (lambda q: ra.checks.require(False, "q\n; two lines"), "more than one line"),
        (lambda q: ra.checks.require(False, "q is wrong"), "has no remedy"),
    ],
)
def test_a_fault_is_seen(call, words):
    q = jnp.ones((B, T, H, D))
    assert words in _fault(Call("a mutant", call, dict(q=q), lambda a: np.ones((B, T, H, D))), "q")
