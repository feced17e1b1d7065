"""The parts of a Transformer layer, written for one device of the mesh (see `parallel.sharding`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ring_attention.attention.feedforward import blockwise_feedforward
from ring_attention.models.config import ModelConfig
from ring_attention.models.products import GATHERED, Products
from ring_attention.models.remat import rematerialised
from ring_attention.models.rope import apply_rotary
from ring_attention.models.weight import Weight, normal_weight, zero_weight

Attend = Callable[..., jax.Array]
"""attend(q_btHD, k_btKD, v_btKD, segment_ids=...) -> out_btHD on a device's slices, as `context_attention_shard`."""


class RMSNorm(nnx.Module):
    """Root mean square normalisation of the last axis (Zhang & Sennrich 2019), in float32."""

    def __init__(self, config: ModelConfig, size: int | None = None):
        self.epsilon = config.norm_epsilon
        self.scale = Weight(jnp.ones(size or config.model_dim, jnp.float32), axes=("norm",), width=None)

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale to a root mean square of 1 and by the learned scale, in the dtype of x."""
        y = x.astype(jnp.float32).reshape(-1, x.shape[-1])  # as in `einsum_of_rows`
        y *= lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale.gathered(jnp.float32)[None]).astype(x.dtype).reshape(x.shape)


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
        self.biased, self.normed = config.qkv_bias, config.qk_norm
        if self.biased:
            self.query_bias = zero_weight(("heads", "head_dim"), (H, D))
            self.key_bias = zero_weight(("kv_heads", "head_dim"), (K, D))
            self.value_bias = zero_weight(("kv_heads", "head_dim"), (K, D))
        if self.normed:
            self.query_norm, self.key_norm = RMSNorm(config, D), RMSNorm(config, D)

    @jax.named_scope("projections")
    def __call__(self, x_btM: jax.Array, rotary, segment_ids: jax.Array | None, attend: Attend) -> jax.Array:
        """What attention adds to the residual stream, [b,t,M]; `rotary` holds the tables of this device's positions."""

        def some_heads(weights):
            return attend(*self._heads(x_btM, weights, rotary, GATHERED), segment_ids=segment_ids)

        weights, out_weight = self._ready(x_btM.dtype, GATHERED), self.out.gathered(x_btM.dtype)
        if self.groups == 1:
            return GATHERED.produce("bthd,hdm->btm", some_heads(weights), out_weight)
        grouped = [jnp.stack(jnp.split(w, self.groups, axis=-2)) for w in weights]  # heads are the last axis but one
        out = lax.map(rematerialised(some_heads, self.remat), grouped)
        return GATHERED.produce("gbthd,ghdm->btm", out, jnp.stack(jnp.split(out_weight, self.groups)))

    def project(self, x_btM: jax.Array, rotary, products: Products) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [b,t,h,D], and keys and values [b,t,k,D], of this device's heads; queries and keys are turned."""
        return self._heads(x_btM, self._ready(x_btM.dtype, products), rotary, products)

    def combine(self, out_bthD: jax.Array, products: Products) -> jax.Array:
        """What attention's output over this device's heads adds to the residual stream, [b,t,M]."""
        return products.produce("bthd,hdm->btm", out_bthD, products.ready(self.out, out_bthD.dtype))

    def _ready(self, dtype, products: Products) -> list[jax.Array]:
        """Weights of queries, keys and values, then their biases if there are any."""
        weights = [products.ready(weight, dtype) for weight in (self.query, self.key, self.value)]
        biases = (self.query_bias, self.key_bias, self.value_bias) if self.biased else ()
        return weights + [bias.gathered(dtype) for bias in biases]

    def _heads(self, x_btM, weights, rotary, products: Products):
        q, k, v = products.contract("btm,mhd->bthd", x_btM, *weights[:3])
        if self.biased:
            q, k, v = (y + bias[None, None] for y, bias in zip((q, k, v), weights[3:], strict=True))
        if self.normed:
            q, k = self.query_norm(q), self.key_norm(k)
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020), a chunk of tokens at a time; its hidden width is sharded over tp."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        M, F = config.model_dim, config.ffn_dim
        self.chunk, self.keep_products = config.ffn_chunk, config.remat == "none"
        self.gate = normal_weight(rngs, ("model", "ffn"), (M, F), M)
        self.up = normal_weight(rngs, ("model", "ffn"), (M, F), M)
        self.down = normal_weight(rngs, ("ffn", "model"), (F, M), F * 2 * config.num_layers)

    @jax.named_scope("feedforward")
    def __call__(self, x_btM: jax.Array, products: Products = GATHERED) -> jax.Array:
        """What the feed-forward adds to the residual stream, [b,t,M]."""
        gate, up, down = (products.ready(weight, x_btM.dtype) for weight in (self.gate, self.up, self.down))

        def swiglu(x_bcM):
            gated_bcF, up_bcF = products.contract("bcm,mf->bcf", x_bcM, gate, up)
            return products.produce("bcf,fm->bcm", jax.nn.silu(gated_bcF) * up_bcF, down)

        return blockwise_feedforward(swiglu, x_btM, chunk_size=self.chunk, keep_products=self.keep_products)


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

    def with_cache(self, x_btM: jax.Array, rotary, attend: Callable, products: Products) -> tuple[jax.Array, Any]:
        """The residual stream after this layer, and the cache; `attend(q, k, v) -> (out, cache)`."""
        out, cache = attend(*self.attention.project(self.attention_norm(x_btM), rotary, products))
        x_btM += self.attention.combine(out, products)
        return x_btM + self.feedforward(self.feedforward_norm(x_btM), products), cache
