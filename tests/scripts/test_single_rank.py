"""The devices of a ring one after the other on one: so fused kernels are tested where there is only one accelerator.

    pytest -m '' tests/scripts/test_single_rank.py

On a GPU that runs cuDNN and Tokamax, on a TPU splash. Everywhere it holds the kernel for all devices to the same bound.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_helpers import Bound

import ring_attention as ra
from ring_attention.attention.kernels import KERNELS, require_platform
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.doctor.single_rank import SingleRank
from ring_attention.testing import random_qkv

B, H, K, D, P = 1, 4, 2, 64, 4
T = 2 * P * 128
MASKS = {
    "causal": {},
    "bidirectional": dict(causal=False),
    "window": dict(window=300),
    "documents": dict(segment_ids=np.where(np.arange(T) < 700, 1, 2)[None]),
    "documents that come back": dict(segment_ids=np.where(np.arange(T) // 100 % 2, 1, 2)[None]),
    "softcap": dict(softcap=3.0),
}


def _results(qkv, kernel, layout, mask):
    """(out, dq, dk, dv) in natural order."""
    device = SingleRank(kernel=KERNELS[kernel], layout=layout)
    segments, mask = mask.get("segment_ids"), {name: x for name, x in mask.items() if name != "segment_ids"}
    mask = MaskSpec(scale=D**-0.5, **mask)
    q, k, v, dout = (_dealt(x, layout).swapaxes(2, 3) for x in qkv)
    segments = None if segments is None else _dealt(jnp.asarray(segments, jnp.int32), layout)
    device.kernel.check(mask, q[0])

    @jax.jit
    def run(place):
        out, lse = device.forward(place, q[place], k, v, segments, mask)
        return out, *device.backward(place, q[place], k, v, segments, mask, out, lse, dout[place])

    outs, dqs, dkvs = zip(*(run(place) for place in range(P)), strict=True)
    of_keys = [jnp.stack([sum(dkvs[i][i - j][n] for i in range(P)) for j in range(P)]) for n in range(2)]
    found = [jnp.stack(outs), jnp.stack(dqs), *of_keys]
    return [_joined(x.swapaxes(2, 3), layout) for x in found]


def _dealt(x, layout):
    """[P,B,t,...] of an array [B,T,...] in natural order."""
    x = layout.permute(jnp.asarray(x), 1)
    return x.reshape(x.shape[0], P, -1, *x.shape[2:]).swapaxes(0, 1)


def _joined(x, layout):
    """The reverse."""
    return layout.unpermute(np.asarray(x).swapaxes(0, 1).reshape(x.shape[1], T, *x.shape[3:]), 1)


DTYPES = {
    "xla": ["float32"],
    "cudnn": ["bfloat16", "float16"],
    "tokamax": ["bfloat16", "float16"],
    "splash": ["bfloat16"],
}
CASES = [
    (kernel, layout, mask, dtype)
    for kernel, dtypes in DTYPES.items()
    for layout in ("contiguous", "zigzag", "striped")
    for mask in MASKS
    if (kernel, mask) != ("cudnn", "softcap")
    for dtype in dtypes
]


@pytest.mark.parametrize(
    ("kernel", "layout", "mask", "dtype"),
    [pytest.param(*c, marks=[] if c[1:3] == ("zigzag", "causal") else pytest.mark.slow, id="-".join(c)) for c in CASES],
)
def test_single_ranks_together_are_as_exact_as_dense(kernel, layout, mask, dtype):
    try:
        require_platform(KERNELS[kernel], jax.default_backend())
        if kernel == "tokamax":  # for some GPUs, and an extra
            KERNELS[kernel].check(MaskSpec(scale=1.0), jax.ShapeDtypeStruct((B, H, T // P, D), dtype))
    except ValueError as error:
        pytest.skip(str(error))
    qkv = random_qkv(0, B, T, H, K, D, dtype=dtype)
    got = _results(qkv, kernel, ra.SequenceLayout(layout, P), MASKS[mask])
    assert Bound(qkv, **MASKS[mask]).too_large(got) == {}
