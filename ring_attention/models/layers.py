"""The parts of a Transformer layer, written for one device of the mesh (see `parallel.sharding`)."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ring_attention.attention.feedforward import blockwise_feedforward
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.products import GATHERED, Products
from ring_attention.models.remat import rematerialised
from ring_attention.models.rope import Rotary, apply_rotary
from ring_attention.models.weight import Weight, normal_weight, zero_weight
from ring_attention.parallel.mesh import TENSOR

CLAMP, STEEPNESS = 7.0, 1.702
"""Of the activation "clamped_silu"."""


class ThisAttention(NamedTuple):
    """What attention must know of a layer, and of the heads that it is called for, beside their q, k and v.

    Attributes:
      kind: of the layer.
      number: int32, the layer's number in the model.
      first_head: int32, the number of the first query head among all of the layer.
      sinks: float32 [h], or None.
    """

    kind: LayerKind
    number: jax.Array
    first_head: jax.Array
    sinks: jax.Array | None


class Attend(Protocol):
    """Attention on a device's slices."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, this: ThisAttention, *, segment_ids: jax.Array | None
    ) -> jax.Array:
        """Out [b,t,h,D], of q [b,t,h,D] and of k and v [b,t,k,D]."""
        ...


class Norm(nnx.Module):
    """Normalisation of the last axis, in float32: `ModelConfig.norm`, or of queries and keys across all heads."""

    def __init__(self, config: ModelConfig, shape: tuple[int, ...] = (), *, across: bool = False):
        """Make the norm of arrays [..., *shape], by default [..., M]; with `across`, of heads that tp shares out."""
        self.epsilon, self.offset, self.across = config.norm_epsilon, float(config.norm_zero_centered), across
        self.centred = config.norm == "layer"
        axes = ("heads", "head_dim") if across else ("norm",)
        shape = shape or (config.model_dim,)
        self.scale = Weight(jnp.full(shape, 1 - self.offset, jnp.float32), axes=axes, width=None)

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale to a root mean square of 1 and by the learned scale, in the dtype of x."""
        scale = self.scale.gathered(jnp.float32).reshape(-1) + self.offset
        y = x.astype(jnp.float32).reshape(-1, scale.size)  # as in `einsum_of_rows`
        if self.centred:
            y -= self._mean(y)
        y *= lax.rsqrt(self._mean(jnp.square(y)) + self.epsilon)
        return (y * scale[None]).astype(x.dtype).reshape(x.shape)

    def _mean(self, y: jax.Array) -> jax.Array:
        mean = jnp.mean(y, axis=-1, keepdims=True)
        return lax.pmean(mean, TENSOR) if self.across else mean


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions; heads are sharded over tp."""

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs):
        M, H, K, D, E = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
        self.groups, self.remat, self.kind = config.head_groups, config.remat, kind
        self.key_dim, self.value_dim = D, E
        self.query = normal_weight(rngs, ("model", "heads", "head_dim"), (M, H, D), M)
        self.key = normal_weight(rngs, ("model", "kv_heads", "head_dim"), (M, K, D), M)
        if config.start_local:
            self.query[...] = jnp.repeat(self.key[...], H // K, axis=1)
        self.value = normal_weight(rngs, ("model", "kv_heads", "head_dim"), (M, K, E), M)
        self.out = normal_weight(rngs, ("heads", "head_dim", "model"), (H, E, M), H * E * 2 * config.num_layers)
        self.biased, self.normed, self.out_biased = config.qkv_bias, config.qk_norm, config.out_bias
        if self.biased:
            self.query_bias = zero_weight(("heads", "head_dim"), (H, D))
            self.key_bias = zero_weight(("kv_heads", "head_dim"), (K, D))
            self.value_bias = zero_weight(("kv_heads", "head_dim"), (K, E))
        if self.out_biased:
            self.out_bias = zero_weight(("norm",), (M,))
        if self.normed:
            across = config.qk_norm_across
            self.query_norm = Norm(config, (H, D) if across else (D,), across=across)
            self.key_norm = Norm(config, (K, D) if across else (D,), across=across)
        if kind.sinks:
            self.sinks = zero_weight(("heads",), (H,))

    @jax.named_scope("projections")
    def __call__(
        self, x_btM: jax.Array, rotary: Rotary, segment_ids: jax.Array | None, number: jax.Array, attend: Attend
    ) -> jax.Array:
        """What attention adds to the residual stream, [b,t,M]; `rotary` holds the tables of this device's positions."""

        def some_heads(weights_and_group):
            weights, group = weights_and_group
            q, k, v = self._padded(*self._heads(x_btM, weights, rotary, GATHERED))
            out = attend(q, k, v, self.this(number, q.shape[2], group), segment_ids=segment_ids)
            return out[..., : self.value_dim]

        weights, out_weight = self._ready(x_btM.dtype, GATHERED), self.out.gathered(x_btM.dtype)
        if self.groups == 1:
            return self._produce("bthd,hdm->btm", some_heads((weights, 0)), out_weight, GATHERED)
        grouped = [jnp.stack(jnp.split(w, self.groups, axis=-2)) for w in weights]  # heads are the last axis but one
        groups = jnp.arange(self.groups, dtype=jnp.int32)
        out = lax.map(rematerialised(some_heads, self.remat), (grouped, groups))
        return self._produce("gbthd,ghdm->btm", out, jnp.stack(jnp.split(out_weight, self.groups)), GATHERED)

    def this(self, number: jax.Array, heads: int, group: int | jax.Array = 0) -> ThisAttention:
        """What attention must know of this layer, for one group of so many of this device's heads."""
        sinks = None
        if self.kind.sinks:
            sinks = lax.dynamic_slice_in_dim(self.sinks.gathered(jnp.float32), group * heads, heads)
        return ThisAttention(self.kind, number, (lax.axis_index(TENSOR) * self.groups + group) * heads, sinks)

    def with_cache(
        self, x_btM: jax.Array, rotary: Rotary, number: jax.Array, attend: Callable, products: Products
    ) -> tuple[jax.Array, Any]:
        """What attention adds to the residual stream, and the cache; `attend(q, k, v, this) -> (out, cache)`."""
        weights = self._ready(x_btM.dtype, products)
        q, k, v = self._padded(*self._heads(x_btM, weights, rotary, products))
        out, cache = attend(q, k, v, self.this(number, q.shape[2]))
        out, weight = out[..., : self.value_dim], products.ready(self.out, out.dtype)
        return self._produce("bthd,hdm->btm", out, weight, products), cache

    def _produce(self, equation: str, out, weight, products: Products) -> jax.Array:
        y_btM = products.produce(equation, out, weight)
        return y_btM + self.out_bias.gathered(y_btM.dtype)[None, None] if self.out_biased else y_btM

    def _ready(self, dtype, products: Products) -> list[jax.Array]:
        """Weights of queries, keys and values, then their biases if there are any."""
        weights = [products.ready(weight, dtype) for weight in (self.query, self.key, self.value)]
        biases = (self.query_bias, self.key_bias, self.value_bias) if self.biased else ()
        return weights + [bias.gathered(dtype) for bias in biases]

    def _heads(self, x_btM, weights, rotary: Rotary, products: Products):
        q, k, v = products.contract("btm,mhd->bthd", x_btM, *weights[:3])
        if self.biased:
            q, k, v = (y + bias[None, None] for y, bias in zip((q, k, v), weights[3:], strict=True))
        if self.normed:
            q, k = self.query_norm(q), self.key_norm(k)
        return apply_rotary(q, *rotary.query), apply_rotary(k, *rotary.key), v

    def _padded(self, *qkv: jax.Array) -> list[jax.Array]:
        """Queries, keys and values of one width: zeros at their ends change neither scores nor what is cut off."""
        width = max(self.key_dim, self.value_dim)
        return [x if x.shape[-1] == width else jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in qkv]


class FeedForward(nnx.Module):
    """A gated feed-forward (Shazeer 2020), a chunk of tokens at a time; its hidden width is sharded over tp."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        M, F = config.model_dim, config.ffn_dim
        self.chunk, self.keep_products = config.ffn_chunk, config.remat == "none"
        self.activation, self.biased = config.activation, config.ffn_bias
        self.gate = normal_weight(rngs, ("model", "ffn"), (M, F), M)
        self.up = normal_weight(rngs, ("model", "ffn"), (M, F), M)
        self.down = normal_weight(rngs, ("ffn", "model"), (F, M), F * 2 * config.num_layers)
        if self.biased:
            self.gate_bias, self.up_bias = zero_weight(("ffn",), (F,)), zero_weight(("ffn",), (F,))
            self.down_bias = zero_weight(("norm",), (M,))

    @jax.named_scope("feedforward")
    def __call__(self, x_btM: jax.Array, products: Products = GATHERED) -> jax.Array:
        """What the feed-forward adds to the residual stream, [b,t,M]."""
        dtype = x_btM.dtype
        gate, up, down = (products.ready(weight, dtype) for weight in (self.gate, self.up, self.down))
        biases = (self.gate_bias, self.up_bias, self.down_bias) if self.biased else ()
        biases = [bias.gathered(dtype)[None, None] for bias in biases]

        def gated(x_bcM):
            gated_bcF, up_bcF = products.contract("bcm,mf->bcf", x_bcM, gate, up)
            if biases:
                gated_bcF, up_bcF = gated_bcF + biases[0], up_bcF + biases[1]
            return products.produce("bcf,fm->bcm", _activated(self.activation, gated_bcF, up_bcF), down)

        y_btM = blockwise_feedforward(gated, x_btM, chunk_size=self.chunk, keep_products=self.keep_products)
        return y_btM + biases[2] if biases else y_btM


def _activated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    if activation == "silu":
        return jax.nn.silu(gate) * up
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
    return gate * jax.nn.sigmoid(STEEPNESS * gate) * (up + 1)


class Layer(nnx.Module):
    """Attention and feed-forward around the residual stream, with norms where `ModelConfig.norm_place` says."""

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs):
        self.place, self.scale = config.norm_place, config.residual_scale
        if self.place != "after":
            self.attention_norm = Norm(config)
        self.attention = Attention(config, kind, rngs)
        if self.place in ("after", "both"):
            self.attention_out_norm = Norm(config)
        if self.place in ("before", "both"):
            self.feedforward_norm = Norm(config)
        self.feedforward = FeedForward(config, rngs)
        if self.place in ("after", "both"):
            self.feedforward_out_norm = Norm(config)

    def __call__(
        self, x_btM: jax.Array, attended: Callable[[Attention, jax.Array], tuple], products: Products = GATHERED
    ) -> tuple[jax.Array, Any]:
        """The residual stream after this layer, [b,t,M], and what else attention gives.

        Args:
          x_btM: before it.
          attended: attended(attention, x) -> (what attention adds, others), of this layer's attention.
          products: of the feed-forward.
        """
        normed = x_btM if self.place == "after" else self.attention_norm(x_btM)
        out, others = attended(self.attention, normed)
        if self.place == "parallel":
            return x_btM + self._scaled(out + self.feedforward(normed, products)), others
        x_btM += self._scaled(self.attention_out_norm(out) if self.place in ("after", "both") else out)
        out = self.feedforward(x_btM if self.place == "after" else self.feedforward_norm(x_btM), products)
        return x_btM + self._scaled(self.feedforward_out_norm(out) if self.place in ("after", "both") else out), others

    def _scaled(self, x_btM: jax.Array) -> jax.Array:
        return x_btM if self.scale == 1 else x_btM * jnp.asarray(self.scale, x_btM.dtype)
