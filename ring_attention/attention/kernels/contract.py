"""What every kernel promises, so that a ring does not know which one it runs. Heads come first, tokens second to last.

forward(q, k, v, pair, state, blocks) -> state
    q [B,H,t,D]; k [B,K,s,D]; v [B,K,s,D_v]; `state` [B,H,t,D_v], the softmax state of the keys seen in earlier block
    pairs, to go on from.
backward(q, k, v, stats, pair, dq, blocks) -> (dq, dk, dv)
    this pair's part of the gradients of the whole attention, all float32: dq [B,H,t,D] is what earlier pairs gave, to
    add to; dk [B,K,s,D] and dv [B,K,s,D_v] are of this pair alone.
"""

import inspect
from collections.abc import Callable, Collection
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair
from ring_attention.attention.rounding import restored
from ring_attention.checks import require, shown


def no_check(mask: MaskSpec, q) -> None:
    """Accept every mask, size and dtype."""


def no_pair_check(pair: BlockPair) -> None:
    """Accept every pair of query and key blocks."""


_SPELT = {"slopes": "alibi_slopes", "dropout": "dropout_rate", "extra": "extra_mask", "traced_scale": "traced scale"}


def refuse_in_mask(kernel: str, mask: MaskSpec, *fields: str) -> None:
    """Raise ValueError where the mask has one of these fields, which the kernel cannot do."""
    for name in fields:
        remedy = 'leave it out, or use impl="xla"'
        require(not _has(getattr(mask, name)), f'impl="{kernel}" has no {_SPELT.get(name, name)}; {remedy}')


def _has(value) -> bool:
    return value if isinstance(value, bool) else value is not None


def halve(length: int, blocks: BlockSizes) -> int:
    """How many of a shard's `length` local keys are in the first of the two parts of a backward pass."""
    return length // 2 or 1  # a single token is all in the earlier part


def require_signature(kernel: str, called: Callable, arguments: Collection[str]) -> None:
    """Raise ValueError unless `called`, which is private to JAX, can be called with `arguments`.

    It must know each of them and need no other. A release that adds, drops or renames one is then refused in words
    before anything is traced, and any other is accepted, whatever its number.
    """
    parameters = inspect.signature(called).parameters.values()
    named = [x for x in parameters if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)]
    needed = {x.name for x in named if x.default is x.empty}
    open_ended = any(x.kind is x.VAR_KEYWORD for x in parameters)
    unknown = set() if open_ended else {*arguments} - {x.name for x in named}
    found = {"needs": needed - {*arguments}, "does not know": unknown}
    differences = [f"{what} {', '.join(sorted(names))}" for what, names in found.items() if names]
    if differences:
        refuse_binding(kernel, f"{called.__name__} {' and '.join(differences)}")


def refuse_binding(kernel: str, difference: str) -> NoReturn:
    """Raise ValueError: what the kernel binds of JAX is another there, as `difference` says."""
    remedy = 'use impl="xla", or a version of JAX that docs/kernels.md lists'
    raise ValueError(f'impl="{kernel}" does not fit jax {jax.__version__}, whose {difference}; {remedy}')


class Kernel(NamedTuple):
    """One way to compute a pair of query and key blocks.

    Attributes:
      name: by which it is chosen.
      forward, backward: as above.
      check: (mask, q), of which it reads the shape [B,H,t,D], D being the wider of the two head dims, and the dtype;
        raises ValueError for what it cannot do.
      check_pair: (pair), of which it reads the mask and the runs of queries and keys, so that it costs no tracing;
        raises ValueError where the kernel cannot compute such a pair.
      platform: of the devices that it runs on, as `jax.Device.platform` has it; None for all.
      merge_waits: whether a ring lets `state` and dq wait for what is on its way. For a kernel that computes a pair by
        itself and only then takes these in, on TPU: with merging to put beside it, that compiler starts a transfer
        after the pair that was to hide it.
      halve: where a ring's backward pass cuts the local keys in two, for a kernel whose forward pass must compute the
        scores of both parts just as they are there.
      differentiates_lse: whether its backward uses `GlobalStats.delta`, which holds the cotangent of lse, and not out.
      float32_out: whether what its forward adds to the state is float32, and not rounded to the dtype of q; the
        backward pass then gets what is lost where the whole is rounded, too (see `rounding`).
    """

    name: str
    forward: Callable
    backward: Callable
    check: Callable = no_check
    check_pair: Callable = no_pair_check
    platform: str | None = None
    merge_waits: bool = False
    halve: Callable = halve
    differentiates_lse: bool = True
    float32_out: bool = False


def require_lse(kernel: Kernel, return_lse: bool) -> None:
    """Raise ValueError unless the kernel can differentiate the lse, or nobody asks for it."""
    fits = isinstance(return_lse, bool | np.bool_)
    require(fits, f"return_lse={shown(return_lse)} must be True or False; leave it out for the output alone")
    require(
        kernel.differentiates_lse or not return_lse,
        f'impl={kernel.name!r} cannot differentiate the lse; leave return_lse out, or use impl="xla"',
    )


class GlobalStats(NamedTuple):
    """Softmax statistics over *all* keys: with these a block pair's gradient is its share of the whole attention's.

    With the out and lse of the pair alone it would be the gradient of a smaller attention.

    Attributes:
      out: [B,H,t,D_v] in the dtype of q; None where queries were sent here without it, since delta says enough.
      lse: float32 [B,H,t].
      dout: [B,H,t,D_v] cotangent of out.
      delta: float32 [B,H,t], sum over D_v of dout * out, less the cotangent of lse (Dao et al. 2022, appendix B.2).
    """

    out: jax.Array | None
    lse: jax.Array
    dout: jax.Array
    delta: jax.Array

    @staticmethod
    def of(
        out: jax.Array,
        lse: jax.Array,
        dout: jax.Array,
        dlse: jax.Array | None = None,
        rounding: jax.Array | None = None,
    ) -> "GlobalStats":
        """Bundle the statistics and work out delta; `rounding` is what out lacks, as `rounded` says it, or None."""
        exact = restored(out, rounding)
        delta = jnp.einsum("bhtd,bhtd->bht", dout.astype(exact.dtype), exact, preferred_element_type=jnp.float32)
        return GlobalStats(out, lse, dout, delta if dlse is None else delta - dlse)
