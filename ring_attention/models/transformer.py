"""A decoder-only Transformer in Flax NNX, written for one device of the mesh (see `parallel.sharding`)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from ring_attention.attention.varying import vary_over
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind, Run
from ring_attention.models.layers import Attend, Attention, Layer, Norm, ThisAttention
from ring_attention.models.loss import Logits, chunked_cross_entropy, weighted_cross_entropy
from ring_attention.models.products import GATHERED, Products
from ring_attention.models.remat import name_input, rematerialised
from ring_attention.models.rope import Rotary, rotary_tables, with_query_growth
from ring_attention.models.weight import normal_weight
from ring_attention.parallel.host_memory import on_device
from ring_attention.parallel.mesh import SEQUENCE, TENSOR
from ring_attention.parallel.sharding import TOKEN_AXES, resized, spec_of, stored_shape


class Stacks(nnx.Module):
    """Layers of several kinds: a stack for each run of `ModelConfig.loop`, by its name."""

    def __init__(self, stacks: Mapping[str, Layer]):
        for name, stack in stacks.items():
            setattr(self, name, stack)


class Transformer(nnx.Module):
    """Token ids in, next-token losses out. Runs inside a `shard_map` over the mesh, on a device's slices."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        V, M = config.vocab_size, config.model_dim
        self.config = config
        self.embed = normal_weight(rngs, ("vocab", "model"), (V, M), M if config.tied_embeddings else 1)
        if config.start_local:
            self.embed[...] += jax.random.normal(rngs.params(), (1, M))
        stacks = {run.path: _stack(config, run, rngs) for run in config.loop.runs}
        self.layers = stacks.pop(("layers",), None) or Stacks({path[1]: stack for path, stack in stacks.items()})
        self.norm = Norm(config)
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
          length: tokens of the whole sequence but for padding, which rotary scaling "dynamic" or "longrope" goes
            by; None: none of the tokens is padding. A row of packed documents is one sequence.
        """
        hidden_btM = self.hidden(tokens, positions=positions, segment_ids=segment_ids, attend=attend, length=length)
        unembed_Mv = self._unembedding(GATHERED)
        options = dict(chunk_size=self.config.loss_chunk, logits=self._logits)
        return chunked_cross_entropy(hidden_btM, unembed_Mv, targets, **options)

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
        options = dict(chunk_size=self.config.loss_chunk, logits=self._logits)
        return weighted_cross_entropy(hidden_btM, unembed_Mv, targets, weights, **options)

    def logits(self, tokens: jax.Array, *, positions: jax.Array, segment_ids: jax.Array | None, attend: Attend):
        """float32 [b,t,v]: scores of this device's share of the vocabulary. Training never makes them."""
        hidden_btM = self.hidden(tokens, positions=positions, segment_ids=segment_ids, attend=attend)
        return self.logits_of(hidden_btM, GATHERED)

    def logits_of(self, hidden_btM: jax.Array, products: Products) -> jax.Array:
        """float32 [b,t,v]: scores of this device's share of the vocabulary, of hidden states after the last norm."""
        scores_btv = products.contract("btm,mv->btv", hidden_btM, self._unembedding(products), dtype=jnp.float32)[0]
        return self._logits.of(scores_btv)

    @property
    def _logits(self) -> Logits:
        return Logits(self.config.logit_scale, self.config.logit_softcap)

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
        x_btM = self._embed(tokens, GATHERED)
        length = tokens.shape[1] * lax.axis_size(SEQUENCE) if length is None else length
        rotary = self._rotary(positions, length)

        def run_layer(x_btM, build, layer, run: Run, number, place):
            def attended(attention: Attention, x_btM):
                return attention(x_btM, rotary(run.kind), segment_ids, number, attend), None

            x_btM, _ = build(on_device(layer))(name_input(x_btM), attended)
            return x_btM, None if observe is None else observe(x_btM)

        x_btM, observed = self._through_layers(x_btM, run_layer, self.config.remat)
        return self.norm(x_btM) if observe is None else (self.norm(x_btM), observed)

    def _rotary(self, positions: jax.Array, length: int) -> Callable[[LayerKind], Rotary]:
        """The rotary tables of each kind of layer; those that are alike are made once."""
        rotary = {}
        for rope in self.config.ropes:
            tables = rotary_tables(positions, self.config.head_dim, rope, length=length)
            rotary[rope] = with_query_growth(tables, positions, rope)
        return lambda kind: rotary[kind.rope or self.config.rope]

    def _through_layers(self, carry: Any, run_layer: Callable, remat: str = "none") -> tuple[Any, Any]:
        """Carry something through all layers, a loop over periods; also what they give, stacked in their order.

        run_layer(carry, build, layer, run, number, place) -> (carry, given): `build` makes the Layer of the arrays
        `layer`, which has the `number` in the model and the `place` in the stack of `run`, both int32.
        """
        loop = self.config.loop

        def stack_of(run: Run):
            definition, arrays = nnx.split(self.layers if len(run.path) == 1 else getattr(self.layers, run.path[1]))
            places = np.arange(run.count, dtype=np.int32)
            return definition, (arrays, np.array(run.numbers, np.int32), places)

        def through_run(carry, run: Run, definition, layers):
            build = functools.partial(nnx.merge, definition)

            def body(carry, layer):
                arrays, number, place = layer
                return run_layer(carry, build, arrays, run, number, place)

            return lax.scan(rematerialised(body, remat), carry, layers)

        def through_period(carry, layers):
            given = []
            for run, definition, of_run in zip(loop.periodic, definitions, layers, strict=True):
                carry, each = through_run(carry, run, definition, of_run)
                given.append(each)
            return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *given)

        parts = []
        if loop.periodic:
            definitions, layers = zip(*map(stack_of, loop.periodic), strict=True)
            by_period = [
                jax.tree.map(lambda x, run=run: x.reshape(run.periods, run.length, *x.shape[1:]), of_run)
                for run, of_run in zip(loop.periodic, layers, strict=True)
            ]
            carry, given = lax.scan(through_period, carry, by_period)
            parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), given))
        for run in loop.rest:
            carry, given = through_run(carry, run, *stack_of(run))
            parts.append(given)
        return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

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
          length: of the whole sequence, for the rotary scalings "dynamic" and "longrope".
          cache: pytree of arrays, of all layers. The loop over layers carries it, so that it is written in place.
          attend: attend(q, k, v, this, cache, run, place) -> (out, cache), for the layer at the int32 `place` in the
            stack of `run`; `this` is its ThisAttention.
          products: `GATHERED` where tokens are sharded over the mesh as in training, `Stationary` where all devices of
            a ring have the same few.
        """
        x_btM = vary_over(self._embed(tokens, products), frozenset(TOKEN_AXES))  # as norms and biases do
        rotary = self._rotary(positions, length)

        def run_layer(carry, build, layer, run: Run, number, place):
            x_btM, cache = carry

            def attend_here(q, k, v, this: ThisAttention):
                return attend(q, k, v, this, cache, run, place)

            def attended(attention: Attention, x_btM):
                return attention.with_cache(x_btM, rotary(run.kind), number, attend_here, products)

            return build(layer)(x_btM, attended, products), None

        (x_btM, cache), _ = self._through_layers((x_btM, cache), run_layer)
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
        x_btM = products.spread(lax.psum(jnp.where(mine[..., None], rows_btM, 0), TENSOR))
        scale = self.config.embedding_scale
        return x_btM if scale == 1 else x_btM * jnp.asarray(scale, x_btM.dtype)


def _stack(config: ModelConfig, run: Run, rngs: nnx.Rngs) -> Layer:
    """One Layer whose parameters have a leading axis, of the layers of a run."""
    make = nnx.split_rngs(splits=run.count)(nnx.vmap(lambda rngs: Layer(config, run.kind, rngs)))
    return make(rngs)


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
