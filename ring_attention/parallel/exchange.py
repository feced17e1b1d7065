"""From an exchange, which brings queries and keys together, to an attention that can be differentiated.

Devices hold shards of the sequence. How the keys of one get to the queries of another is an `Exchange`; the softmax
over all of them, the residuals and the gradients of sinks are the same whichever it is.
"""

import functools
from typing import Protocol

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ring_attention.attention import sinks as attention_sinks
from ring_attention.attention.derivatives import differentiated_once
from ring_attention.attention.kernels.contract import GlobalStats
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.online_softmax import SoftmaxState

SAVED_NAMES = ("ring_attention_out", "ring_attention_lse")
"""`checkpoint_name`s of what a remat policy must keep so that no exchange runs twice.

Ulysses' swaps stand around its exchange and are done again; ring self-attention is none, and is computed again.
"""


class Exchange(Protocol):
    """One way of bringing this device's queries and all keys together; hashable, since programs depend on it.

    Arrays are this device's slices: q [B,H,t,D], k and v [B,K,t,D], segments int32 [B,t] or None. `me` is its number
    along the axis `axis_name`, int32.
    """

    axis_name: str

    def forward(self, me, q, k, v, segments, mask: MaskSpec) -> SoftmaxState:
        """Statistics of this device's queries over all keys that they see."""

    def backward(
        self, me, q, k, v, segments, mask: MaskSpec, stats: GlobalStats
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float32 gradients of this device's q, k and v, given the statistics of its queries over all keys."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(exchange: Exchange, q, k, v, segments, mask: MaskSpec, sinks):
    """What this device's queries make of all keys that they see.

    Args:
      exchange: how they meet.
      q: [B,H,t,D].
      k, v: [B,K,t,D].
      segments: int32 [B,t] or None.
      mask: how a query and a key make a weight.
      sinks: float32 [H] or None.

    Returns:
      [B,H,t,D] in the dtype of q.
    """
    return _finished(exchange, q, k, v, segments, mask, sinks)[0]


def _finished(exchange: Exchange, q, k, v, segments, mask: MaskSpec, sinks):
    """(out [B,H,t,D] in the dtype of q, lse float32 [B,H,t])."""
    arrays = _bound(exchange, q, k, v, segments, mask)
    out, lse = attention_sinks.finalize(exchange.forward(*arrays), sinks)
    return out.astype(q.dtype), lse


def _bound(exchange: Exchange, q, k, v, segments, mask: MaskSpec) -> tuple:
    """(me, q, k, v, segments, mask), where this device's number, segments and mask seem to depend on k.

    They are the same in every layer. Where layers are a loop, JAX lifts what follows from such values alone out of it
    and keeps it: where the tokens of each hop stand, which of its tiles are computed, an array for every hop of the
    ring.
    """
    me, k, segments, mask = lax.optimization_barrier((lax.axis_index(exchange.axis_name), k, segments, mask))
    return me, q, k, v, segments, mask


def _attend_forward(exchange: Exchange, q, k, v, segments, mask: MaskSpec, sinks):
    results = _finished(exchange, q, k, v, segments, mask, sinks)
    out, lse = (checkpoint_name(x, name) for x, name in zip(results, SAVED_NAMES, strict=True))
    return out, (q, k, v, segments, mask, sinks, out, lse)


def _attend_backward(exchange: Exchange, residuals, dout):
    q, k, v, segments, mask, sinks, out, lse = residuals
    stats = GlobalStats.of(out, lse, dout)
    grads = exchange.backward(*_bound(exchange, q, k, v, segments, mask), stats)
    grads = (differentiated_once(grad.astype(x.dtype)) for grad, x in zip(grads, (q, k, v), strict=True))
    return *grads, None, None, attention_sinks.gradient(sinks, stats)


attend.defvjp(_attend_forward, _attend_backward)
