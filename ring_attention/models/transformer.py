"""A decoder-only Transformer in Flax NNX, written for one device of the mesh (see `parallel.sharding`)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ring_attention.attention.varying import vary_over
from ring_attention.models.config import ModelConfig
from ring_attention.models.layers import Attend, Layer, RMSNorm
from ring_attention.models.loss import chunked_cross_entropy, weighted_cross_entropy
from ring_attention.models.products import GATHERED, Products
from ring_attention.models.remat import name_input, rematerialised
from ring_attention.models.rope import rotary_tables
from ring_attention.models.weight import normal_weight
from ring_attention.parallel.host_memory import on_device
from ring_attention.parallel.mesh import SEQUENCE, TENSOR
from ring_attention.parallel.sharding import TOKEN_AXES, resized, spec_of, stored_shape


class Transformer(nnx.Module):
    """Token ids in, next-token losses out. Runs inside a `shard_map` over the mesh, on a device's slices."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        V, M, L = config.vocab_size, config.model_dim, config.num_layers
        self.config = config
        self.embed = normal_weight(rngs, ("vocab", "model"), (V, M), M if config.tied_embeddings else 1)
        if config.start_local:
            self.embed[...] += jax.random.normal(rngs.params(), (1, M))
        make_layers = nnx.split_rngs(splits=L)(nnx.vmap(lambda rngs: Layer(config, rngs)))
        self.layers = make_layers(rngs)  # one Layer whose parameters have a leading axis L
        self.norm = RMSNorm(config)
        if not config.tied_embeddings:
            self.unembed = normal_weight(rngs, ("model", "vocab"), (M, V), M**2)  # near-uniform at first

    def token_losses(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        attend: Attend,
        length: int | None = None,
    ) -> jax.Array:
        """Negative log-likelihood of `targets` in nats, float32 [b,t].

        Args:
          tokens: int32 [b,t], this device's slice in the layout's order, as are the others.
          targets: int32 [b,t], the token that follows each in the natural order.
          positions: int32 [b,t], for the rotary embedding; those within a document where several are packed.
          segment_ids: int32 [b,t], or None.
          attend: the attention over all devices' tokens.
          length: tokens of the whole sequence but for padding, which rotary scaling "dynamic" goes by; None: none of
            the tokens is padding. A row of packed documents is one sequence.
        """
        hidden_btM = self.hidden(tokens, positions=positions, segment_ids=segment_ids, attend=attend, length=length)
        unembed_Mv = self._unembedding(GATHERED)
        return chunked_cross_entropy(hidden_btM, unembed_Mv, targets, chunk_size=self.config.loss_chunk)

    def weighted_loss(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        attend: Attend,
    ) -> jax.Array:
        """Sum of this device's `token_losses` times `weights`, float32 [b,t]: what training differentiates."""
        hidden_btM = self.hidden(tokens, positions=positions, segment_ids=segment_ids, attend=attend)
        unembed_Mv = self._unembedding(GATHERED)
        return weighted_cross_entropy(hidden_btM, unembed_Mv, targets, weights, chunk_size=self.config.loss_chunk)

    def logits(self, tokens: jax.Array, *, positions: jax.Array, segment_ids: jax.Array | None, attend: Attend):
        """float32 [b,t,v]: scores of this device's share of the vocabulary. Training never makes them."""
        hidden_btM = self.hidden(tokens, positions=positions, segment_ids=segment_ids, attend=attend)
        return self.logits_of(hidden_btM, GATHERED)

    def logits_of(self, hidden_btM: jax.Array, products: Products) -> jax.Array:
        """float32 [b,t,v]: scores of this device's share of the vocabulary, of hidden states after the last norm."""
        return products.contract("btm,mv->btv", hidden_btM, self._unembedding(products), dtype=jnp.float32)[0]

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        attend: Attend,
        length: int | None = None,
        observe: Callable[[jax.Array], Any] | None = None,
    ):
        """Hidden states after the last norm, [b,t,M] in the compute dtype; `length` as for `token_losses`.

        With `observe`, also what that returns of the residual stream [b,t,M] after each layer, stacked.
        """
        config = self.config
        x_btM = self._embed(tokens, GATHERED)
        length = tokens.shape[1] * lax.axis_size(SEQUENCE) if length is None else length
        rotary = rotary_tables(positions, config.head_dim, config.rope, length=length)
        layer_def, layers = nnx.split(self.layers)

        def run_layer(x_btM, layer):
            x_btM = nnx.merge(layer_def, on_device(layer))(name_input(x_btM), rotary, segment_ids, attend)
            return x_btM, None if observe is None else observe(x_btM)

        x_btM, observed = lax.scan(rematerialised(run_layer, config.remat), x_btM, layers)
        return self.norm(x_btM) if observe is None else (self.norm(x_btM), observed)

    def finite_layers(self, tokens: jax.Array, *, positions: jax.Array, segment_ids: jax.Array | None, attend: Attend):
        """Bool [L]: whether this device's slice of the residual stream is finite after each layer."""
        _, finite_L = self.hidden(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            attend=attend,
            observe=lambda x_btM: jnp.isfinite(x_btM).all(),
        )
        return finite_L

    def with_cache(
        self, tokens: jax.Array, *, positions: jax.Array, length: int, cache: Any, attend: Callable, products: Products
    ) -> tuple[jax.Array, Any]:
        """Hidden states after the last norm, [b,t,M], and the cache with the keys and values of these tokens.

        Args:
          tokens: int32 [b,t].
          positions: int32 [b,t].
          length: of the whole sequence, for rotary scaling "dynamic".
          cache: pytree of arrays, of all layers. The loop over layers carries it, so that it is written in place.
          attend: attend(q, k, v, cache, layer) -> (out, cache); `layer` is its number, int32.
          products: `GATHERED` where tokens are sharded over the mesh as in training, `Stationary` where all devices of
            a ring have the same few.
        """
        x_btM = vary_over(self._embed(tokens, products), frozenset(TOKEN_AXES))  # as norms and biases do
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope, length=length)
        layer_def, layers = nnx.split(self.layers)

        def run_layer(carry, layer_and_number):
            (x_btM, cache), (layer, number) = carry, layer_and_number
            attend_here = lambda q, k, v: attend(q, k, v, cache, number)  # noqa: E731
            return nnx.merge(layer_def, layer).with_cache(x_btM, rotary, attend_here, products), None

        numbers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x_btM, cache), _ = lax.scan(run_layer, (x_btM, cache), (layers, numbers))
        return self.norm(x_btM), cache

    def _unembedding(self, products: Products) -> jax.Array:
        """[M,v], or this device's share of M where weights are stationary."""
        if self.config.tied_embeddings:
            return products.ready(self.embed, self.config.compute_dtype).T
        return products.ready(self.unembed, self.config.compute_dtype)

    @jax.named_scope("embedding")
    def _embed(self, tokens_bt: jax.Array, products: Products) -> jax.Array:
        """Rows of the embedding, whose vocabulary is sharded over tp: each device adds those that it holds."""
        table_vM = products.ready(self.embed, self.config.compute_dtype)
        v = table_vM.shape[0]
        here_bt = tokens_bt - lax.axis_index(TENSOR) * v
        mine = (here_bt >= 0) & (here_bt < v)
        rows_btM = table_vM[jnp.clip(here_bt, 0, v - 1)]
        return products.spread(lax.psum(jnp.where(mine[..., None], rows_btM, 0), TENSOR))


def parameter_specs(config: ModelConfig):
    """PartitionSpecs of the parameters, a nested dict shaped as `nnx.to_pure_dict` of a Transformer's state."""
    model = _abstract_model(config)

    def spec(path, weight):
        axes = ("layers", *weight.axes) if path[0] == "layers" else weight.axes
        return spec_of(axes)

    state = nnx.state(model, nnx.Param)
    return nnx.to_pure_dict(nnx.map_state(spec, state))


def abstract_parameters(config: ModelConfig, mesh_shape: Mapping[str, int] | None = None):
    """Shapes and dtypes of the parameters, shaped as `parameter_specs`; with a mesh's, as they are stored there."""
    params = nnx.to_pure_dict(nnx.state(_abstract_model(config), nnx.Param))
    if mesh_shape is None:
        return params
    stored = lambda x, spec: jax.ShapeDtypeStruct(stored_shape(x.shape, spec, mesh_shape), x.dtype)  # noqa: E731
    return jax.tree.map(stored, params, parameter_specs(config))


def resized_parameters(params: Any, config: ModelConfig, mesh_shape: Mapping[str, int] | None = None) -> Any:
    """The parameters padded as they are stored on a mesh of this shape, or without padding, whichever they had."""
    return jax.tree.map(lambda x, to: resized(x, to.shape), params, abstract_parameters(config, mesh_shape))


def model_builder(config: ModelConfig) -> Callable[[Any], Transformer]:
    """build(params) -> the Transformer with these parameters."""
    graph = nnx.graphdef(_abstract_model(config))
    return lambda params: nnx.merge(graph, params)


def _abstract_model(config: ModelConfig) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
