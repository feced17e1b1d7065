"""Rotary position embedding (Su et al. 2021) with angles that are exact at any position, and its scalings.

The angle of position p and frequency f is 2*pi*frac(p * f / (2*pi)). In float32 the product loses its fraction: at
position 10 million it is off by whole radians. So the fraction is worked out in integers: frequencies, in turns per
token, are 64-bit fixed-point constants, positions are integers, and unsigned overflow drops the whole turns exactly.
What is left is an error of 2**-32 of a turn, below that of a float32 sine.

A scaling stretches the window of a trained model: it is another table of frequencies, worked out in float64.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_attention.checks import require_field

SCALINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_len"),
    "yarn": ("factor", "original_len", "beta_fast", "beta_slow", "attention_factor", "truncate", "query_growth"),
    "llama3": ("factor", "original_len", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "original_len", "attention_factor", "short_factors", "long_factors"),
}
"""The fields of `RopeConfig` that each scaling reads, beside theta."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Frequencies of the rotary embedding; names and formulas as in Hugging Face's configs.

    Attributes:
      theta: base: pair j turns by theta**(-2j/R) radians a token, before scaling, of R turned numbers of a head.
      fraction: of a head that is turned, its first numbers; 0: none, the layer has no positions.
      scaling: how a model is stretched beyond the window that it was trained with. "none"; "linear" divides all
        frequencies by `factor` (Chen et al. 2023); "dynamic" lets theta grow with the length of the sequence
        (NTK-aware); "yarn" divides the slow ones and leaves the fast ones (Peng et al. 2023); "llama3" too, by
        wavelength; "longrope" divides each pair's by a number of its own (Ding et al. 2024), and takes other numbers
        for sequences longer than `original_len`.
      factor: how many times longer the window becomes; 1: as it was.
      original_len: tokens of that window, for "dynamic", "yarn", "llama3" and "longrope".
      low_freq_factor: "llama3": wavelengths longer than original_len / low_freq_factor are stretched by `factor`.
      high_freq_factor: "llama3": those shorter than original_len / high_freq_factor are not, those between by degrees.
      beta_fast: "yarn": pairs that turn more often than beta_fast times in the window are left.
      beta_slow: "yarn": those that turn less often than beta_slow times are stretched, those between by degrees.
      attention_factor: "yarn" and "longrope": queries and keys are multiplied by it, as far as they are turned; 0: with
        "yarn" 0.1 * ln(factor) + 1, with "longrope" the root of 1 + ln(factor) / ln(original_len).
      truncate: "yarn": whether the pairs at which the stretching begins and ends are rounded to whole ones.
      query_growth: "yarn": queries at position p are also multiplied by
        1 + query_growth * ln(1 + floor(p / original_len)) (Ministral 3).
      short_factors: "longrope": what each pair's frequency is divided by in sequences of up to original_len tokens.
      long_factors: "longrope": the same in longer sequences, from their first token on.
    """

    theta: float = 500_000.0
    fraction: float = 1.0
    scaling: str = "none"
    factor: float = 1.0
    original_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True
    query_growth: float = 0.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        require_field(
            self.theta > 1, "model.rope.theta", self.theta, "must be more than 1", "leave it out to take the default"
        )
        need, remedy = "must lie between 0 and 1", "1 turns whole heads"
        require_field(0 <= self.fraction <= 1, "model.rope.fraction", self.fraction, need, remedy)
        require_field(
            self.scaling in SCALINGS,
            "model.rope.scaling",
            self.scaling,
            "is not known",
            f"choose one of {', '.join(SCALINGS)}",
        )
        require_field(self.factor >= 1, "model.rope.factor", self.factor, "must be at least 1", "1 changes nothing")
        for name, remedy in (
            ("attention_factor", "0 takes its default"),
            ("query_growth", "0 leaves queries as they are"),
        ):
            value = getattr(self, name)
            require_field(value >= 0, f"model.rope.{name}", value, "must not be negative", remedy)
        need, remedy = "must be positive, all of them", "give a number for each pair that is turned"
        for name in ("short_factors", "long_factors"):
            value = getattr(self, name)
            require_field(all(each > 0 for each in value), f"model.rope.{name}", value, need, remedy)
        used = SCALINGS[self.scaling]
        for field in dataclasses.fields(self)[3:]:
            value = getattr(self, field.name)
            require_field(
                field.name in used or value == field.default,
                f"model.rope.{field.name}",
                value,
                f"is not used by model.rope.scaling={self.scaling!r}",
                f"leave it out; that one takes {', '.join(used) or 'no other fields'}",
            )
        if "original_len" in used:
            least = 2 if self.scaling == "longrope" else 1
            need = f"must be positive with model.rope.scaling={self.scaling!r}" if least == 1 else "must be at least 2"
            remedy = "give the window that the model was trained with"
            require_field(self.original_len >= least, "model.rope.original_len", self.original_len, need, remedy)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            require_field(
                0 < getattr(self, low) < getattr(self, high),
                f"model.rope.{low}",
                getattr(self, low),
                f"must lie between 0 and model.rope.{high}={getattr(self, high)}",
                "leave both out to take the defaults",
            )
        need, remedy = "multiplies whole queries, so that whole heads must be turned", "leave out model.rope.fraction"
        fits = not self.query_growth or self.fraction == 1
        require_field(fits, "model.rope.query_growth", self.query_growth, need, remedy)

    def check(self, head_dim: int) -> None:
        """Raise ConfigError unless heads of so many numbers can be turned."""
        turned = self.rotary_dim(head_dim)
        need = f"must be even in each layer (rotary pairs), but rope.fraction={self.fraction} turns {turned} of it"
        require_field(turned % 2 == 0, "model.head_dim", head_dim, need, "use 32, 64 or 128")
        for name in ("short_factors", "long_factors") if self.scaling == "longrope" else ():
            count = len(getattr(self, name))
            need = f"must be {turned // 2} numbers, one for each pair of the {turned} numbers of a head that are turned"
            require_field(count == turned // 2, f"model.rope.{name}: length", count, need, "give as many")

    def rotary_dim(self, head_dim: int) -> int:
        """How many numbers of a head are turned."""
        return int(head_dim * self.fraction)

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by."""
        if self.scaling == "yarn":
            return self.attention_factor or 0.1 * math.log(self.factor) + 1
        if self.scaling == "longrope":
            return self.attention_factor or math.sqrt(1 + math.log(self.factor) / math.log(self.original_len))
        return 1.0

    def scaled_length(self, tokens: int) -> int:
        """The smallest length whose `frequencies` are those of a sequence of so many tokens.

        0 but where frequencies depend on the length: with "dynamic" they grow with it beyond `original_len`, with
        "longrope" they change once, there.
        """
        if tokens <= self.original_len or self.scaling not in ("dynamic", "longrope"):
            return 0
        return tokens if self.scaling == "dynamic" else self.original_len + 1


def frequencies(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Radians a token of each pair that is turned, float64.

    `length`, of the sequence, matters to "dynamic" and "longrope" alone.
    """
    head_dim = rope.rotary_dim(head_dim)
    exponents = np.arange(0, head_dim, 2) / head_dim
    plain = rope.theta**-exponents
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "dynamic":
        times = max(length, rope.original_len) / rope.original_len
        growth = (rope.factor * times - (rope.factor - 1)) ** (head_dim / max(head_dim - 2, 1))
        return (rope.theta * growth) ** -exponents
    if rope.scaling == "yarn":
        return _mix(plain, plain / rope.factor, _yarn_share(rope, head_dim))
    if rope.scaling == "longrope":
        return plain / np.array(rope.long_factors if length > rope.original_len else rope.short_factors)
    if rope.scaling == "llama3":
        turns = rope.original_len * plain / (2 * math.pi)  # in the original window
        low, high = rope.low_freq_factor, rope.high_freq_factor
        return _mix(plain, plain / rope.factor, 1 - np.clip((turns - low) / (high - low), 0, 1))
    return plain


def _mix(plain: np.ndarray, stretched: np.ndarray, share: np.ndarray) -> np.ndarray:
    return plain * (1 - share) + stretched * share


def _yarn_share(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """How much of each pair's frequency is stretched: 0 for the fast ones, 1 for the slow ones, a ramp between."""

    def pair_that_turns(times: float) -> float:
        """Number, not whole, of the pair that turns so often in the original window."""
        return head_dim * math.log(rope.original_len / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001  # as Hugging Face has it: a step rather than a division by zero
    return np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)


def rotary_tables(
    positions: jax.Array, head_dim: int, rope: RopeConfig, *, length: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines times `rope.magnitude`, float32 [..., pairs], for integer `positions` [...] in [0, 2**31).

    There is a pair for every two numbers of a head that are turned.
    `length` is that of the whole sequence without padding, which the scalings "dynamic" and "longrope" go by.
    """
    turns = frequencies(rope, head_dim, length) / (2 * math.pi)
    fixed = [int(turn * 2.0**64) for turn in turns]  # Python integers: 64 bits after the point, none lost
    leading = (1,) * positions.ndim
    high = jnp.array([f >> 32 for f in fixed], jnp.uint32).reshape(*leading, -1)
    low = jnp.array([f & 0xFFFFFFFF for f in fixed], jnp.uint32).reshape(*leading, -1)
    position = positions.astype(jnp.uint32)[..., None]
    fraction = position * high + _high_word(position, low)  # of a turn, in 2**-32; overflow drops whole turns
    centred = lax.bitcast_convert_type(fraction, jnp.int32)  # from [0, 1) to [-1/2, 1/2) of a turn
    angle = centred.astype(jnp.float32) * np.float32(2 * math.pi / 2.0**32)
    if rope.magnitude == 1:
        return jnp.cos(angle), jnp.sin(angle)
    return rope.magnitude * jnp.cos(angle), rope.magnitude * jnp.sin(angle)


class Rotary(NamedTuple):
    """Tables of cosines and sines, as `rotary_tables` gives them, for queries and for keys."""

    query: tuple[jax.Array, jax.Array]
    key: tuple[jax.Array, jax.Array]


def with_query_growth(tables: tuple[jax.Array, jax.Array], positions: jax.Array, rope: RopeConfig) -> Rotary:
    """Tables for keys at these positions, and those for queries, which are longer by `rope.query_growth`."""
    if not rope.query_growth:
        return Rotary(tables, tables)
    windows = (positions // rope.original_len).astype(jnp.float32)[..., None]
    growth = 1 + rope.query_growth * jnp.log1p(windows)
    cos, sin = tables
    return Rotary((cos * growth, sin * growth), tables)


def _high_word(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of the 64-bit products of uint32 arrays, by 16-bit halves."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    other = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (other >> 16)


def apply_rotary(x_BTHD: jax.Array, cos_BTd: jax.Array, sin_BTd: jax.Array) -> jax.Array:
    """Turn the pairs (x[j], x[j + d]) of the first 2d numbers of each head, in float32; in the dtype of x."""
    d = cos_BTd.shape[-1]
    if d == 0:
        return x_BTHD
    first, second = x_BTHD[..., :d].astype(jnp.float32), x_BTHD[..., d : 2 * d].astype(jnp.float32)
    cos, sin = cos_BTd[:, :, None], sin_BTd[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.concatenate(turned, axis=-1).astype(x_BTHD.dtype)
    return turned if x_BTHD.shape[-1] == 2 * d else jnp.concatenate([turned, x_BTHD[..., 2 * d :]], axis=-1)
