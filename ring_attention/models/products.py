"""Two ways for weights that are sharded over devices to meet activations.

Training has many tokens: weights travel, each gathered where it is used, and tokens stay (`GATHERED`). Generating has
few: weights stay where they are and the activations of those few tokens travel (`Stationary`), so that a device reads,
and holds, its own share of the weights alone.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.models.weight import Weight
from ring_attention.parallel.mesh import TENSOR
from ring_attention.parallel.sharding import RULES, resized

_MODEL = RULES["model"]


def einsum_of_rows(equation: str, x: jax.Array, weight: jax.Array, dtype=None) -> jax.Array:
    """`jnp.einsum` of activations and a weight, the first two axes of x taken as one where the result has both.

    From sequences and tokens as two axes XLA's CPU compiler makes gradients of large weights at 0.4 of the speed that
    it reaches with rows (docs/experiments.md).
    """
    tokens = equation[:2]
    if not equation.split("->")[1].startswith(tokens):
        return jnp.einsum(equation, x, weight, preferred_element_type=dtype)
    rows = x.reshape(-1, *x.shape[2:])
    y = jnp.einsum(equation.replace(tokens, "n"), rows, weight, preferred_element_type=dtype)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def gradient_over_rows(x: jax.Array, dy: jax.Array, dtype) -> jax.Array:
    """The gradient [M,N] of a weight, from its activations [b,t,M] and the gradient [b,t,N] of what it gave."""
    rows, drows = (z.reshape(-1, z.shape[-1]) for z in (x, dy))
    return jnp.einsum("nm,nv->mv", rows, drows, preferred_element_type=dtype)


class Products(Protocol):
    """How a layer multiplies by its weights; activations are whole along M, in and out."""

    def ready(self, weight: Weight, dtype) -> jax.Array:
        """The weight as the products below take it. Call it outside loops over tokens."""

    def contract(self, equation: str, x: jax.Array, *weights: jax.Array, dtype=None) -> list[jax.Array]:
        """Einsums of x [b,t,M] with each of some weights, summed over M; `dtype` accumulates and comes out."""

    def produce(self, equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Einsum of x with a weight [..., M], M last, summed also over tp: [..., M]."""

    def spread(self, x: jax.Array) -> jax.Array:
        """Rows of a weight [V, M] that were looked up, as [..., M]."""


class _Gathered:
    def ready(self, weight, dtype):
        return weight.gathered(dtype)

    def contract(self, equation, x, *weights, dtype=None):
        return [einsum_of_rows(equation, x, weight, dtype) for weight in weights]

    def produce(self, equation, x, weight):
        return lax.psum(einsum_of_rows(equation, x, weight), TENSOR)

    def spread(self, x):
        return x


@dataclasses.dataclass(frozen=True)
class Stationary:
    """Products with weights that stay where they are, of a model `width` wide; see `Products`."""

    width: int

    def ready(self, weight, dtype):
        """The share of the weight that this device has."""
        return weight[...].astype(dtype)

    def contract(self, equation, x, *weights, dtype=None):
        """One sum over devices for all the weights: their parts travel side by side, in float32."""
        share = weights[0].shape[0]  # of all weights here the first axis is M
        padded = resized(x, (*x.shape[:-1], share * lax.axis_size(_MODEL)))
        mine = lax.dynamic_slice_in_dim(padded, lax.axis_index(_MODEL) * share, share, axis=-1)
        parts = [jnp.einsum(equation, mine, weight, preferred_element_type=jnp.float32) for weight in weights]
        packed = lax.psum(jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1), _MODEL)
        ends = [sum(part[0, 0].size for part in parts[: i + 1]) for i in range(len(parts) - 1)]
        whole = jnp.split(packed, ends, axis=-1)
        return [y.reshape(part.shape).astype(dtype or x.dtype) for y, part in zip(whole, parts, strict=True)]

    def produce(self, equation, x, weight):
        """Each device's part of M, put together."""
        return self.spread(lax.psum(jnp.einsum(equation, x, weight), TENSOR))

    def spread(self, x):
        """The parts of M that devices have, put together."""
        return lax.all_gather(x, _MODEL, axis=x.ndim - 1, tiled=True, to="invarying")[..., : self.width]


GATHERED: Products = _Gathered()
