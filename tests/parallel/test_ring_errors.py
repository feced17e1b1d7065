"""What rings refuse: what they got, what they need, and a remedy. Shapes alone are given, so that nothing compiles."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.testing import random_qkv

KEY = jax.random.key(0)
DEFAULT_SPEC = Spec(("dp", "fsdp"), "sp", "tp", None)

# Of both functions.
BAD_VALUES = {
    "unknown layout": (
        dict(layout="spiral"),
        "layout='spiral' is not known; choose one of 'contiguous', 'striped', 'zigzag'",
    ),
    "layout of another ring": (
        dict(layout=ra.SequenceLayout("striped", 8)),
        "layout is for ring_size=8, but the mesh axis has 4 devices; use SequenceLayout('striped', 4)",
    ),
    "unknown kernel": (
        dict(impl="magic"),
        "impl='magic' is not known; choose one of 'auto', ",
    ),
    "window of nothing": (
        dict(window=0),
        "window=0 must be a whole number of tokens, 1 (itself alone) or more; None sees all",
    ),
    "window of a fraction": (
        dict(window=2.5),
        "window=2.5 must be a whole number of tokens, 1 (itself alone) or more; None sees all",
    ),
    "bound on segments that are not there": (
        dict(max_segment_len=8),
        "max_segment_len=8 bounds segments, but there are none; give segment_ids, or window instead",
    ),
    "window without end": (
        dict(window=float("inf")),
        "window=inf must be a whole number of tokens, 1 (itself alone) or more; None sees all",
    ),
    "sinks of words": (
        dict(sinks=["a", "b", "c", "d"]),
        "sinks=['a', 'b', 'c', 'd'] are no numbers, need one for each of the H=4 query heads; give an array or list",
    ),
    "a list of too few slopes": (
        dict(alibi_slopes=[1.0, 0.5]),
        "alibi_slopes has shape (2,), need [H=4]; reshape or transpose it before the call",
    ),
    "softcap": (
        dict(softcap=-1.0),
        "softcap=-1.0 must be a finite positive number; None leaves it out",
    ),
    "scale": (
        dict(scale=float("inf")),
        "scale=inf must be a finite number; None leaves it out",
    ),
    "dropout of all": (
        dict(dropout_rate=1.0, dropout_key=KEY),
        "dropout_rate=1.0 must be at least 0 and less than 1; 0 leaves dropout out",
    ),
    "dropout without a key": (
        dict(dropout_rate=0.1),
        "dropout_rate=0.1 needs dropout_key; pass jax.random.key(seed), another one at each step",
    ),
    "sinks for key heads": (
        dict(sinks=np.zeros(2)),
        "sinks has shape (2,), need [H=4]; reshape or transpose it before the call",
    ),
    "slopes for each head alone": (
        dict(alibi_slopes=np.zeros((4, 1))),
        "alibi_slopes has shape (4, 1), need [H=4]; reshape or transpose it before the call",
    ),
}

# (other sizes of the arrays, arguments, message)
BAD_CALLS = {
    "query heads over tp": (
        dict(H=3, K=1),
        {},
        "heads of q=3 is not divisible by tp=2; use fewer devices on these axes",
    ),
    "key heads over tp": (
        dict(H=4, K=1),
        {},
        "heads of k=1 is not divisible by tp=2; repeat each head of k and v 2 times, jnp.repeat(k, 2, axis=2), or use "
        "fewer devices on these axes",
    ),
    "heads that do not divide": (
        dict(H=4, K=3),
        {},
        "q has H=4 heads and k has K=3; K must divide H (grouped queries); repeat heads of k and v, or use others",
    ),
    "integers": (
        dict(dtype="int32"),
        {},
        "q has dtype int32, need float32, bfloat16 or float16; cast q, k and v",
    ),
    "axis name": (
        {},
        dict(axis_name="ring"),
        f"axis_name='ring' is not an axis of the mesh, which has {dict(dp=1, fsdp=1, sp=4, tp=2)}; name one of these",
    ),
    "spec without the ring": (
        {},
        dict(spec=Spec("sp", None)),
        f"spec={Spec('sp', None)} must shard axis 1 (tokens) over 'sp' alone and leave axis 3 (head_dim) whole; "
        f"for example {DEFAULT_SPEC}",
    ),
    "spec that cuts heads apart": (
        {},
        dict(spec=Spec(None, "sp", None, "tp")),
        f"spec={Spec(None, 'sp', None, 'tp')} must shard axis 1 (tokens) over 'sp' alone and leave axis 3 "
        f"(head_dim) whole; for example {DEFAULT_SPEC}",
    ),
    "spec of too many axes": (
        {},
        dict(spec=Spec(None, "sp", None, None, None)),
        f"spec={Spec(None, 'sp', None, None, None)} must shard axis 1 (tokens) over 'sp' alone and leave axis 3 "
        f"(head_dim) whole; for example {DEFAULT_SPEC}",
    ),
    "spec with an unknown axis": (
        {},
        dict(spec=Spec("rows", "sp")),
        f"spec={Spec('rows', 'sp')} names 'rows', but the mesh has {dict(dp=1, fsdp=1, sp=4, tp=2)}; drop it from spec",
    ),
    "segments of another length": (
        {},
        dict(segment_ids=np.zeros((2, 24), np.int32)),
        "segment_ids has shape (2, 24), need [B=2, T=48]; reshape or transpose it before the call",
    ),
    "segments of one axis": (
        {},
        dict(segment_ids=np.zeros(48, np.int32)),
        "segment_ids has shape (48,), need [B=2, T=48]; reshape or transpose it before the call",
    ),
    "segments of no length": (
        {},
        dict(segment_ids=np.zeros((2, 48), np.int32), max_segment_len=0),
        "max_segment_len=0 must be a whole number of tokens, 1 (itself alone) or more; None sees all",
    ),
    **{name: ({}, *bad) for name, bad in BAD_VALUES.items()},
}


def _whole(message):
    """A pattern for the whole message, or for one that goes on after a space; JAX may add lines of its own."""
    return "(?m)^" + re.escape(message) + ("" if message.endswith(" ") else "$")


def _eval_shape(**arguments):
    """ra.ring_attention as far as shapes go."""
    return functools.partial(jax.eval_shape, functools.partial(ra.ring_attention, **arguments))


def test_ring_attention_takes_a_good_call():
    q, k, v, _ = random_qkv(0, 2, 47, 4, 2, 8)
    good = dict(window=1, softcap=1.0, dropout_rate=0.5, dropout_key=KEY, sinks=np.zeros(4), alibi_slopes=np.ones(4))
    good |= dict(segment_ids=np.zeros((2, 47), int), max_segment_len=1, mesh=ra.make_mesh(sp=4, tp=2))
    assert _eval_shape(**good)(q, k, v).shape == q.shape


@pytest.mark.parametrize("case", BAD_CALLS)
def test_ring_attention_refuses_a_bad_call_with_a_remedy(case):
    sizes, arguments, message = BAD_CALLS[case]
    q, k, v, _ = random_qkv(0, **(dict(B=2, T=48, H=4, K=2, D=8) | sizes))
    with pytest.raises(ValueError, match=_whole(message)):
        _eval_shape(**(dict(mesh=ra.make_mesh(sp=4, tp=2)) | arguments))(q, k, v)


def test_ring_attention_refuses_a_batch_that_does_not_divide():
    q, k, v, _ = random_qkv(0, B=3, T=48, H=4, K=2, D=8)
    message = "batch of q=3 is not divisible by dpxfsdp=4; use fewer devices on these axes"
    with pytest.raises(ValueError, match=_whole(message)):
        _eval_shape(mesh=ra.make_mesh(dp=2, fsdp=2, sp=2))(q, k, v)


# (other shapes of the slices, arguments, message)
BAD_SLICES = {
    "a length of two sequences": (
        dict(k=(2, 6, 2, 8), v=(2, 6, 2, 8)),
        dict(seq_len=20),
        "seq_len is of one sequence, and keys are of another; give kv_lengths",
    ),
    "segments of the whole sequence": (
        dict(segment_ids=(2, 20)),
        {},
        "segment_ids has shape (2, 20), need [B=2, t=5]; reshape or transpose it before the call",
    ),
    "slices that zigzag cannot cut in two": (
        {},
        dict(layout="zigzag"),
        'seq_len=20 is not divisible by 2*sp (zigzag)=8; pad to 24 or use layout="striped"',
    ),
    **{name: ({}, *bad) for name, bad in BAD_VALUES.items()},
}


@pytest.mark.parametrize("case", BAD_SLICES)
def test_ring_attention_shard_refuses_a_bad_call(case):
    shapes, arguments, message = BAD_SLICES[case]
    shapes = dict(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8)) | shapes
    slices = {name: jnp.zeros((4, *shape), int if name == "segment_ids" else float) for name, shape in shapes.items()}
    on_shard = functools.partial(ra.ring_attention_shard, **arguments)
    with pytest.raises(ValueError, match=_whole(message)):
        jax.eval_shape(jax.vmap(lambda slices: on_shard(**slices), axis_name="sp"), slices)
