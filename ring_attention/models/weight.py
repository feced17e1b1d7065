"""A parameter that knows its logical axes."""

import jax
import jax.numpy as jnp
from flax import nnx

from ring_attention.parallel.sharding import gather_weight


class Weight(nnx.Param):
    """A float32 parameter that knows its logical axes, and its width along "model" (None: it has no such axis)."""

    def gathered(self, dtype) -> jax.Array:
        """The weight as a computation in `dtype` needs it."""
        return gather_weight(self[...], self.axes, jnp.dtype(dtype), self.width)


def normal_weight(rngs: nnx.Rngs, axes: tuple[str, ...], shape: tuple[int, ...], fan_in: float) -> Weight:
    """A weight drawn from a normal distribution with variance 1/fan_in."""
    width = shape[axes.index("model")]
    return Weight(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5, axes=axes, width=width)


def zero_weight(axes: tuple[str, ...], shape: tuple[int, ...]) -> Weight:
    """A bias that begins at 0."""
    return Weight(jnp.zeros(shape, jnp.float32), axes=axes, width=None)
