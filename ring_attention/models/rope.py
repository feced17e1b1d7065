"""Rotary position embedding (Su et al. 2021) with angles that are exact at any position.

The angle of position p and frequency f is 2*pi*frac(p * f / (2*pi)). In float32 the product loses its fraction: at
position 10 million it is off by whole radians. So the fraction is worked out in integers: frequencies, in turns per
token, are 64-bit fixed-point constants, positions are integers, and unsigned overflow drops the whole turns exactly.
What is left is an error of 2**-32 of a turn, below that of a float32 sine.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def rotary_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [..., head_dim/2], for integer `positions` [...] in [0, 2**31).

    The j-th pair turns by theta**(-2j/head_dim) radians a token.
    """
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    fixed = [int(turn * 2.0**64) for turn in turns]  # Python integers: 64 bits after the point, none lost
    high = jnp.array([f >> 32 for f in fixed], jnp.uint32)
    low = jnp.array([f & 0xFFFFFFFF for f in fixed], jnp.uint32)
    position = positions.astype(jnp.uint32)[..., None]
    fraction = position * high + _high_word(position, low)  # of a turn, in 2**-32; overflow drops whole turns
    centred = lax.bitcast_convert_type(fraction, jnp.int32)  # from [0, 1) to [-1/2, 1/2) of a turn
    angle = centred.astype(jnp.float32) * np.float32(2 * math.pi / 2.0**32)
    return jnp.cos(angle), jnp.sin(angle)


def _high_word(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of the 64-bit products of uint32 arrays, by 16-bit halves."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    other = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (other >> 16)


def apply_rotary(x_BTHD: jax.Array, cos_BTd: jax.Array, sin_BTd: jax.Array) -> jax.Array:
    """Turn the pairs (x[j], x[j + D/2]) of each head; worked out in float32, returned in the dtype of x."""
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTd[:, :, None], sin_BTd[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BTHD.dtype)
