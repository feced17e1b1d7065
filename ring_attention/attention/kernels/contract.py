"""What every kernel promises, so that a ring does not know which one it runs. Heads come first, tokens second to last.

forward(q, k, v, hop, running, blocks) -> running
    q [B,H,t,D]; k, v [B,K,s,D]; `running` [B,H,t,D], the statistics of the keys seen in earlier hops, to go on from.
backward(q, k, v, whole, hop, dq, blocks) -> (dq, dk, dv)
    this hop's part of the gradients of the whole attention, all float32: dq [B,H,t,D] is what earlier hops gave, to add
    to; dk and dv [B,K,s,D] are of this hop alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_attention.attention.rule import Rule
from ring_attention.checks import require


def no_check(rule: Rule, q) -> None:
    """Every rule, size and dtype will do."""


def require_version(kernel: str, versions: tuple[str, ...]) -> None:
    """Raise ValueError unless this is one of the versions of JAX whose private functions the kernel calls."""
    version = ".".join(jax.__version__.split(".")[:2])
    known = ", ".join(versions)
    require(version in versions, f'impl="{kernel}" was read in jax {known}, this is {version}; use impl="xla"')


class Kernel(NamedTuple):
    """One way to compute a hop.

    Attributes:
      name: by which it is chosen.
      forward, backward: as above.
      check: (rule, q), of which it reads the shape [B,H,t,D] and the dtype; raises ValueError for what it cannot do.
      platform: of the devices that it runs on, as `jax.Device.platform` has it; None for all.
      merge_waits: whether a ring lets `running` and dq wait for what is on its way. For a kernel that computes a hop by
        itself and only then takes these in, on TPU: with merging to put beside it, that compiler starts a transfer
        after the hop that was to hide it.
      differentiates_lse: whether its backward uses `Whole.delta`, in which the cotangent of lse is, rather than out.
    """

    name: str
    forward: Callable
    backward: Callable
    check: Callable = no_check
    platform: str | None = None
    merge_waits: bool = False
    differentiates_lse: bool = True


class Whole(NamedTuple):
    """Statistics over *all* keys of the sequence: with these a hop's gradient is its share of the whole attention's.

    With a hop's own out and lse it would be the gradient of a smaller attention: right forward, wrong backward.

    Attributes:
      out: [B,H,t,D] in the dtype of q; None where queries were sent here without it, since delta says enough.
      lse: float32 [B,H,t].
      dout: [B,H,t,D] cotangent of out.
      delta: float32 [B,H,t], sum over D of dout * out, less the cotangent of lse (Dao et al. 2022, appendix B.2).
    """

    out: jax.Array | None
    lse: jax.Array
    dout: jax.Array
    delta: jax.Array

    @staticmethod
    def of(out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array | None = None) -> "Whole":
        """Bundle the statistics and work out delta."""
        delta = jnp.einsum("bhtd,bhtd->bht", dout, out, preferred_element_type=jnp.float32)
        return Whole(out, lse, dout, delta if dlse is None else delta - dlse)
