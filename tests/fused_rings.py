"""What is asked of each kernel that computes static tiles: rings of four devices beside the oracle."""

import itertools

import numpy as np
import pytest
from ring_helpers import Bound, results, ring_mesh, sharded

import ring_attention as ra
from ring_attention.testing import random_qkv

B, T, H, K, D, P = 2, 256, 4, 2, 64, 4
LAYOUTS = {
    "contiguous": ra.SequenceLayout("contiguous", P),
    "zigzag": ra.SequenceLayout("zigzag", P),
    "striped": ra.SequenceLayout("striped", P),
    "dealt": ra.SequenceLayout.for_speeds([1, 1, 0.5, 1], chunks_per_shard=2),
}
QUICK = [("contiguous", "window"), ("zigzag", "causal")]


def run(impl, qkv, layout, arguments, strategy="ring", devices=P):
    """(out, dq, dk, dv) of a ring, or of another strategy."""
    arguments = dict(arguments)
    layout = LAYOUTS[layout] if devices == P else layout
    attend = sharded(ring_mesh(devices), layout, strategy=strategy, impl=impl)
    return results(attend, qkv, arguments.pop("sinks", None), **arguments)


def each_ring(masks):
    """Parametrize a test by all layouts and the names of these masks."""
    cases = [pytest.param(*case, marks=_marks(*case), id="-".join(case)) for case in itertools.product(LAYOUTS, masks)]
    return pytest.mark.parametrize(("layout", "mask"), cases)


def _marks(layout, mask):
    if (layout, mask) in QUICK:
        return []
    many = layout == "dealt" or mask == "documents" and layout != "zigzag"
    return [pytest.mark.slow, pytest.mark.nightly] if many else pytest.mark.slow


each_strategy = pytest.mark.parametrize("strategy", ["all_gather", "ulysses", "usp"])
each_padded = pytest.mark.parametrize(
    "arguments", [{}, dict(causal=False), dict(sinks=np.full(H, -200, np.float32))], ids=str
)


def too_large(impl, layout, arguments, *, tokens=T, rows=B, kv_heads=K, dtype="bfloat16", strategy="ring"):
    """The errors of a ring that are beyond the bound, by name."""
    qkv = random_qkv(0, rows, tokens, H, kv_heads, D, dtype=dtype)
    return Bound(qkv, **arguments).too_large(run(impl, qkv, layout, arguments, strategy))
