"""What every kernel promises, so that a ring does not know which one it runs.

forward(q, k, v, hop, scale, blocks) -> (out, lse)
    q [B,t,H,D]; k, v [B,s,K,D]; out float32 [B,t,H,D], normalised over this hop's keys alone; lse float32 [B,t,H].
backward(q, k, v, whole, hop, scale, blocks) -> (dq, dk, dv)
    float32 gradients of this hop's part of the whole attention, in the shapes of q, k and v.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kernel(NamedTuple):
    """One way to compute a hop."""

    name: str
    forward: Callable
    backward: Callable


class Whole(NamedTuple):
    """Statistics over *all* keys of the sequence: with these a hop's gradient is its share of the whole attention's.

    With a hop's own out and lse it would be the gradient of a smaller attention: right forward, wrong backward.

    Attributes:
      out: [B,t,H,D] in the dtype of q.
      lse: float32 [B,t,H].
      dout: [B,t,H,D] cotangent of out.
      delta: float32 [B,t,H], sum over D of dout * out, less the cotangent of lse (Dao et al. 2022, appendix B.2).
    """

    out: jax.Array
    lse: jax.Array
    dout: jax.Array
    delta: jax.Array

    @staticmethod
    def of(out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array | None = None) -> "Whole":
        """Bundle the statistics and work out delta."""
        delta = jnp.einsum("bthd,bthd->bth", dout, out, preferred_element_type=jnp.float32)
        return Whole(out, lse, dout, delta if dlse is None else delta - dlse)
