"""How the product of a query and a key becomes a weight: one specification for every tile, device and strategy."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ring_attention.attention.dropout import Dropout, seeds_of
from ring_attention.attention.mask import Mask
from ring_attention.attention.mask_args import MASK_DEFAULTS, MaskArgs, Window
from ring_attention.checks import is_number, is_whole, require, require_shape, shown

LEAST_SCALE = 1e-20
"""A scale that is data counts as no nearer to 0 than this."""

LONGEST = 2**31 - 1
"""No two positions are this far apart."""


def _static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """score = softcap(scale * q.k) - slope * distance where the mask lets the query see the key, else -inf.

    What the conditions on positions show, a row for each query and a column for each key, 5 of each:

        causal           window=2         min_distance=2   seq_len=3
        1 0 0 0 0        1 1 0 0 0        0 0 1 1 1        1 1 1 0 0
        1 1 0 0 0        1 1 1 0 0        0 0 0 1 1        1 1 1 0 0
        1 1 1 0 0        0 1 1 1 0        1 0 0 0 1        1 1 1 0 0
        1 1 1 1 0        0 0 1 1 1        1 1 0 0 0        0 0 0 0 0
        1 1 1 1 1        0 0 0 1 1        1 1 1 0 0        0 0 0 0 0

    A query sees the keys that all of them show.

    Attributes:
      scale: of the products, where it is known as the program is traced.
      traced_scale: float32 [], takes the place of `scale` where that is data; None where it is not.
      causal: a query sees its own position and those before it; otherwise all of them.
      window: a query sees positions less than this far away; (left, right) for so many before and after itself, each
        None for no bound; None for no bound on either side.
      min_distance: a query sees only positions at least this far away; 0 for all.
      seq_len: positions from here on are padding that nobody sees and that sees nothing; None where there is none.
      softcap: scores x become softcap * tanh(x / softcap); None leaves them (Gemma 2).
      slopes: float32 [H], ALiBi's (Press et al. 2022): scores fall by slope for each position of distance; or None.
      dropout: of weights, or None.
      extra: a further condition on positions, or None.
      intervals: whether queries have intervals (`Tokens.low`), which show more than `causal` and `window` do.
      kv_bias: whether keys have a bias (`Tokens.bias`).
    """

    scale: float = _static()
    causal: bool = _static(default=True)
    window: Window = _static(default=None)
    min_distance: int = _static(default=0)
    seq_len: int | None = _static(default=None)
    softcap: float | None = _static(default=None)
    slopes: jax.Array | None = None
    dropout: Dropout | None = None
    extra: Mask | None = _static(default=None)
    traced_scale: jax.Array | None = None
    intervals: bool = _static(default=False)
    kv_bias: bool = _static(default=False)

    @property
    def factor(self) -> float | jax.Array:
        """What products of queries and keys are multiplied by: the scale, whether it is data or not.

        Data is kept from 0 by so little that no score shows it: the scale's gradient is found by division.
        """
        scale = self.traced_scale
        if scale is None:
            return self.scale
        return scale + jax.lax.stop_gradient(jnp.where(jnp.abs(scale) < LEAST_SCALE, LEAST_SCALE - scale, 0))

    @property
    def behind(self) -> int | None:
        """By how much less than this a key may stand before its query as `window` has it; None for no bound."""
        return self._side(0)

    @property
    def ahead(self) -> int | None:
        """The same for keys after their query."""
        return self._side(1)

    def _side(self, side: int) -> int | None:
        if not isinstance(self.window, tuple):
            return self.window
        tokens = self.window[side]
        return None if tokens is None else tokens + 1

    @property
    def reach(self) -> int | None:
        """Nobody sees a key this far away or farther, as is known without a look at data; None for no bound."""
        if self.causal:
            return None if self.intervals else self.behind
        return None if self.behind is None or self.ahead is None else max(self.behind, self.ahead)

    def of_heads(self, start: int | jax.Array, number: int) -> "MaskSpec":
        """The specification for `number` of the heads, from `start` on."""

        def of(x):
            return jax.lax.dynamic_slice_in_dim(x, start, number)

        dropout = self.dropout and dataclasses.replace(self.dropout, heads=of(self.dropout.heads))
        return dataclasses.replace(self, slopes=None if self.slopes is None else of(self.slopes), dropout=dropout)


def make_mask_spec(
    q: jax.Array,
    *,
    batch_offset: int | jax.Array = 0,
    head_offset: int | jax.Array = 0,
    seq_len: int | None = None,
    **arguments: Unpack[MaskArgs],
) -> MaskSpec:
    """The mask specification for queries q [B,t,H,D], whose first sequence and head have these global indices.

    The arguments are those of the public functions, checked already (`checked_mask_args`).
    """
    B, _, H, D = q.shape
    mask: dict[str, Any] = {**MASK_DEFAULTS, **arguments}
    dropout = None
    if mask["dropout_rate"] > 0:
        batch, heads = batch_offset + jnp.arange(B, dtype=jnp.int32), head_offset + jnp.arange(H, dtype=jnp.int32)
        dropout = Dropout(
            rate=mask["dropout_rate"],
            seeds=seeds_of(mask["dropout_key"]),
            batch=batch.astype(jnp.int32),
            heads=heads.astype(jnp.int32),
        )
    slopes, scale = mask["alibi_slopes"], mask["scale"]
    data = _is_data(scale)
    return MaskSpec(
        scale=D**-0.5 if scale is None or data else float(scale),
        traced_scale=jnp.asarray(scale, jnp.float32) if data else None,
        causal=bool(mask["causal"]),
        window=bounded(mask["window"], bool(mask["causal"])),
        seq_len=seq_len,
        softcap=None if mask["softcap"] is None else float(mask["softcap"]),
        slopes=None if slopes is None else jax.lax.stop_gradient(jnp.asarray(slopes, jnp.float32)),
        dropout=dropout,
        extra=mask["extra_mask"],
        intervals=mask["intervals"] is not None,
        kv_bias=mask["kv_bias"] is not None,
    )


def checked_mask_args(arguments: Mapping[str, Any], heads: int, *, traced_scale: bool = False) -> dict[str, Any]:
    """`arguments` with the defaults of those left out, as plain values and arrays [H].

    Segment ids are not looked at: their shape is that of the function that takes them. With `traced_scale` the scale
    may be a number that JAX is still tracing, and stays one.

    Raises:
      ValueError: for values out of range, and for sinks or slopes that are not one for each of the query heads.
    """
    mask: dict[str, Any] = {**MASK_DEFAULTS, **arguments}
    scale = mask["scale"]
    if traced_scale and _is_data(scale):
        _check_traced_scale(scale)
        mask["scale"] = None
    names = ("causal", "window", "softcap", "scale", "dropout_rate", "dropout_key")
    check_mask_spec(*(mask[name] for name in names))
    _check_extra(mask["extra_mask"])
    mask |= {name: of_heads(name, mask[name], heads) for name in ("sinks", "alibi_slopes")}
    mask |= {name: None if mask[name] is None else float(mask[name]) for name in ("softcap", "scale")}
    mask["scale"] = scale if mask["scale"] is None else mask["scale"]
    causal, dropout_rate = bool(mask["causal"]), float(mask["dropout_rate"])
    return mask | dict(causal=causal, dropout_rate=dropout_rate, window=bounded(mask["window"], causal))


def scale_gradient(mask: MaskSpec, q: jax.Array, dq: jax.Array) -> MaskSpec | None:
    """The cotangent of a mask specification whose scale is data, as a `custom_vjp` returns it; None where it is not.

    Scores are scale * q.k, so the scale's gradient is the sum of q * dq, over the scale.

    Args:
      mask: the specification.
      q: queries [B,H,t,D].
      dq: float32, their gradients.
    """
    if mask.traced_scale is None:
        return None
    of_scale = jnp.einsum("bhtd,bhtd->", q.astype(jnp.float32), dq.astype(jnp.float32)) / mask.factor
    return dataclasses.replace(mask, slopes=None, dropout=None, traced_scale=of_scale)


def _is_data(scale) -> bool:
    """Whether this is an array whose value is not known as the program is traced."""
    return isinstance(scale, Tracer)


def _check_traced_scale(scale) -> None:
    """Raise ValueError unless this is one number with a fraction."""
    fits = scale.shape == () and jnp.issubdtype(scale.dtype, jnp.floating)
    got = f"scale is {scale.dtype}{list(scale.shape)}"
    require(fits, f"{got}, need one number of a floating dtype; for one each head multiply q by it")


def as_sinks(sinks) -> jax.Array | None:
    """Sinks as float32 [H], or None."""
    return None if sinks is None else jnp.asarray(sinks, jnp.float32)


def of_heads(name: str, values, heads: int) -> Any:
    """`values` as an array [H], which they may be already, or a list of numbers, or None; raises ValueError."""
    if values is None:
        return None
    if not hasattr(values, "shape"):
        try:
            values = np.asarray(values, np.float32)
        except (TypeError, ValueError):
            got = f"{name}={shown(values)} are no numbers"
            raise ValueError(f"{got}, need one for each of the H={heads} query heads; give an array or list") from None
    require_shape(name, values.shape, (heads,), "H")
    return values


def check_mask_spec(causal, window, softcap, scale, dropout_rate, dropout_key) -> None:
    """Raise ValueError for values that mean nothing."""
    fits = is_number(causal) and causal in (True, False)
    require(fits, f"causal={shown(causal)} must be True or False; leave it out to take True")
    check_window("window", window)
    for name, value in {"softcap": softcap, "scale": scale}.items():
        fits = value is None or (is_number(value) and math.isfinite(value) and (value > 0 or name == "scale"))
        kind = "a finite positive number" if name == "softcap" else "a finite number"
        require(fits, f"{name}={shown(value)} must be {kind}; None leaves it out")
    fits = is_number(dropout_rate) and dropout_rate >= 0
    fits = fits and round(dropout_rate * 2**32) < 2**32  # dropout counts in 32 bits
    require(fits, f"dropout_rate={shown(dropout_rate)} must be at least 0 and less than 1; 0 leaves dropout out")
    remedy = "pass jax.random.key(seed), another one at each step"
    require(dropout_rate == 0 or dropout_key is not None, f"dropout_rate={dropout_rate!r} needs dropout_key; {remedy}")
    fits = dropout_key is None or _is_key(dropout_key)
    require(fits, f"dropout_key={shown(dropout_key)} must be one random key; {remedy}")


def _check_extra(mask) -> None:
    """Raise ValueError unless this is None or a mask that programs can depend on."""
    fits = mask is None or (isinstance(mask, Mask) and type(mask).__hash__ is not None)
    require(fits, f"extra_mask={shown(mask)} must be a Mask that can be hashed; make its class a frozen dataclass")


def _is_key(key) -> bool:
    """Whether this is a `jax.random` key, new style or old, and not many of them."""
    if not hasattr(key, "dtype"):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape == ()
    return key.dtype == jnp.uint32 and key.ndim == 1


def bounded(window: Window, causal: bool) -> Window:
    """`window` in the one way that masks have it: as (left, right) only where the sides differ, and None for no bound.

    No bound is what is as long as any sequence, too: positions are int32, and the mask compares with them.
    """
    if isinstance(window, tuple):
        left, right = (None if x is None or x >= LONGEST else int(x) for x in window)
        if not causal and left != right:
            return left, right
        window = None if left is None else left + 1
    return None if window is None or window >= LONGEST else int(window)


def check_window(name: str, window: Window) -> None:
    """Raise ValueError unless `window` is None, a number of tokens, or (left, right) as two numbers or None."""
    if isinstance(window, tuple):
        fits = len(window) == 2 and all(x is None or is_whole(x, 0) for x in window)
        need = "need (left, right), how many tokens are seen before and after each, 0 or more"
        require(fits, f"{name}={shown(window)} is not two whole numbers of tokens, {need}; None sees all of a side")
    else:
        check_distance(name, window)


def check_distance(name: str, tokens: int | None) -> None:
    """Raise ValueError unless `tokens` is None or a number of tokens."""
    fits = tokens is None or is_whole(tokens, 1)
    require(fits, f"{name}={shown(tokens)} must be a whole number of tokens, 1 (itself alone) or more; None sees all")
