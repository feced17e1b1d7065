"""The parts of a Transformer layer, written for one device of the mesh (see `parallel.sharding`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ring_attention.attention.feedforward import blockwise_feedforward
from ring_attention.models.config import ModelConfig
from ring_attention.models.remat import rematerialised
from ring_attention.models.rope import apply_rotary
from ring_attention.parallel.mesh import TENSOR
from ring_attention.parallel.sharding import gather_weight

Attend = Callable[..., jax.Array]
"""attend(q_btHD, k_btKD, v_btKD, segment_ids=...) -> out_btHD on a device's slices, as `context_attention_shard`."""


class Weight(nnx.Param):
    """A float32 parameter that knows its logical axes."""

    def gathered(self, dtype) -> jax.Array:
        """The weight as a computation in `dtype` needs it."""
        return gather_weight(self[...], self.axes, jnp.dtype(dtype))


def normal_weight(rngs: nnx.Rngs, axes: tuple[str, ...], shape: tuple[int, ...], fan_in: float) -> Weight:
    """A weight drawn from a normal distribution with variance 1/fan_in."""
    return Weight(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5, axes=axes)


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019), in float32."""

    def __init__(self, config: ModelConfig):
        self.epsilon = config.norm_epsilon
        self.scale = Weight(jnp.ones(config.model_dim, jnp.float32), axes=("norm",))

    def __call__(self, x_btM: jax.Array) -> jax.Array:
        """Scale each token to a root mean square of 1 and by the learned scale, in the dtype of x."""
        x = x_btM.astype(jnp.float32)
        x *= lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale.gathered(jnp.float32)).astype(x_btM.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions; heads are sharded over tp."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        M, H, K, D = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.groups, self.remat = config.head_groups, config.remat
        self.query = normal_weight(rngs, ("model", "heads", "head_dim"), (M, H, D), M)
        self.key = normal_weight(rngs, ("model", "kv_heads", "head_dim"), (M, K, D), M)
        if config.start_local:
            self.query[...] = jnp.repeat(self.key[...], H // K, axis=1)
        self.value = normal_weight(rngs, ("model", "kv_heads", "head_dim"), (M, K, D), M)
        self.out = normal_weight(rngs, ("heads", "head_dim", "model"), (H, D, M), H * D * 2 * config.num_layers)

    def __call__(self, x_btM: jax.Array, rotary, segment_ids: jax.Array | None, attend: Attend) -> jax.Array:
        """What attention adds to the residual stream, [b,t,M]; `rotary` holds the tables of this device's positions."""
        dtype = x_btM.dtype
        weights = [w.gathered(dtype) for w in (self.query, self.key, self.value)]
        out_weight = self.out.gathered(dtype)

        def some_heads(weights):
            query, key, value = weights
            q = apply_rotary(jnp.einsum("btm,mhd->bthd", x_btM, query), *rotary)
            k = apply_rotary(jnp.einsum("btm,mkd->btkd", x_btM, key), *rotary)
            v = jnp.einsum("btm,mkd->btkd", x_btM, value)
            return attend(q, k, v, segment_ids=segment_ids)

        if self.groups == 1:
            out = jnp.einsum("bthd,hdm->btm", some_heads(weights), out_weight)
        else:
            grouped = [jnp.stack(jnp.split(w, self.groups, axis=1)) for w in weights]
            out = lax.map(rematerialised(some_heads, self.remat), grouped)
            out = jnp.einsum("gbthd,ghdm->btm", out, jnp.stack(jnp.split(out_weight, self.groups)))
        return lax.psum(out, TENSOR)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020), a chunk of tokens at a time; its hidden width is sharded over tp."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        M, F = config.model_dim, config.ffn_dim
        self.chunk = config.ffn_chunk
        self.gate = normal_weight(rngs, ("model", "ffn"), (M, F), M)
        self.up = normal_weight(rngs, ("model", "ffn"), (M, F), M)
        self.down = normal_weight(rngs, ("ffn", "model"), (F, M), F * 2 * config.num_layers)

    def __call__(self, x_btM: jax.Array) -> jax.Array:
        """What the feed-forward adds to the residual stream, [b,t,M]."""
        gate, up, down = (weight.gathered(x_btM.dtype) for weight in (self.gate, self.up, self.down))

        def swiglu(x_bcM):
            return lax.psum((jax.nn.silu(x_bcM @ gate) * (x_bcM @ up)) @ down, TENSOR)

        return blockwise_feedforward(swiglu, x_btM, chunk_size=self.chunk)


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward around the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.feedforward_norm = RMSNorm(config)
        self.feedforward = FeedForward(config, rngs)

    def __call__(self, x_btM: jax.Array, rotary, segment_ids: jax.Array | None, attend: Attend) -> jax.Array:
        """The residual stream after this layer, [b,t,M]."""
        x_btM += self.attention(self.attention_norm(x_btM), rotary, segment_ids, attend)
        return x_btM + self.feedforward(self.feedforward_norm(x_btM))
