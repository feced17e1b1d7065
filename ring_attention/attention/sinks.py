"""Attention sinks: a learned logit for each head that takes part in the softmax but has no value (Xiao et al. 2023).

A row may so give its weight to nothing. To the softmax a sink is one more key, known to every device, so it joins once,
at the end, and never travels.
"""

import jax
import jax.numpy as jnp

from ring_attention.attention import online_softmax
from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.online_softmax import SoftmaxState


def finalize(state: SoftmaxState, sinks_H: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Out [B,H,t,D] and lse [B,H,t], float32, of statistics over all keys and of the sinks, where there are any."""
    if sinks_H is not None:
        state = online_softmax.merge(state, jnp.float32(0), sinks_H[None, :, None])
    return online_softmax.finalize(state)


def gradient(sinks_H: jax.Array | None, stats: GlobalStats) -> jax.Array | None:
    """float32 [H], of the loss with respect to the sinks; from this device's queries alone."""
    if sinks_H is None:
        return None
    p_BHt = jnp.exp(sinks_H[None, :, None] - online_softmax.finite(stats.lse))
    return -jnp.sum(p_BHt * stats.delta, (0, 2))
