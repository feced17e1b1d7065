"""Is each kernel right here? A rank of a ring beside the float64 oracle, in units of dense attention's error."""

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.kernels import KERNELS, require_platform
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.checks import one_line
from ring_attention.doctor.single_rank import SingleRank
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.ring import check_pairs
from ring_attention.parallel.strategy import Context
from ring_attention.testing import NAMES, dense_attention, errors, oracle, out_and_gradients, random_qkv

RING, PLACE = 3, 1
"""A zigzag ring, and the place in it that meets keys from before and from behind, each in one of its hops."""

HEADS, KV_HEADS = 4, 2


def refusal(name: str, platform: str, *, shard: int, head_dim: int, dtype: str) -> str | None:
    """Why a kernel cannot compute causal zigzag hops of such shapes here; None if it can."""
    kernel, mask = KERNELS[name], MaskSpec(scale=head_dim**-0.5)
    layout = SequenceLayout("zigzag", RING)
    try:
        require_platform(kernel, platform)
        kernel.check(mask, jax.ShapeDtypeStruct((1, HEADS, shard, head_dim), dtype))
        check_pairs(Context(axis_name="sp", layout=layout, kernel=kernel, blocks=BlockSizes()), mask, shard)
    except (ValueError, ImportError) as error:
        return one_line(error)
    return None


def error_ratios(name: str, *, shard: int, head_dim: int, dtype: str) -> dict[str, float]:
    """The errors of out, dq, dk and dv of one rank's causal attention, over dense attention's in the same dtype."""
    layout, tokens = SequenceLayout("zigzag", RING), RING * shard
    q, k, v, dout = random_qkv(0, B=1, T=tokens, H=HEADS, K=KV_HEADS, D=head_dim, dtype=dtype)
    deals = layout.positions(tokens).reshape(RING, shard)
    rows = deals[PLACE]
    dout = jnp.zeros_like(dout).at[:, rows].set(dout[:, rows])  # of this rank's queries alone

    def of_rank(out, dq, dk, dv):
        return out[:, rows], dq[:, rows], dk, dv

    want = of_rank(*oracle(q, k, v, dout))
    dense = errors(of_rank(*out_and_gradients(dense_attention, q, k, v, dout)), want)
    got = errors(_rank(name, layout, deals, q, k, v, dout), want)
    return {part: mine / other for part, mine, other in zip(NAMES, got, dense, strict=True)}


def _rank(name: str, layout: SequenceLayout, deals: np.ndarray, q, k, v, dout):
    """Out and dq [1,t,H,D] of the rank, dk and dv [1,T,K,D] in natural order."""
    rank, mask, place = SingleRank(kernel=KERNELS[name], layout=layout), MaskSpec(scale=q.shape[-1] ** -0.5), PLACE
    queries, cotangents = (x[:, deals[place]].swapaxes(1, 2) for x in (q, dout))
    keys, values = (jnp.stack([x[:, deal].swapaxes(1, 2) for deal in deals]) for x in (k, v))

    @jax.jit
    def run(place, q, k, v, dout):
        out, lse = rank.forward(place, q, k, v, None, mask)
        return out, *rank.backward(place, q, k, v, None, mask, out, lse, dout)

    out, dq, shares = run(jnp.int32(place), queries, keys, values, cotangents)
    gradients = [np.zeros(k.shape, np.float32) for _ in range(2)]
    for hop, share in enumerate(shares):
        for whole, part in zip(gradients, share, strict=True):
            whole[:, deals[(place - hop) % RING]] = np.asarray(part, np.float32).swapaxes(1, 2)
    return out.swapaxes(1, 2), dq.swapaxes(1, 2), *gradients
