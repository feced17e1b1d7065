"""Cross-entropy a chunk of tokens at a time, so that no [tokens, vocabulary] array ever exists.

For use inside a `shard_map` over the mesh: tokens are this device's, and so are the columns of the unembedding, whose
vocabulary is sharded over tp.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.attention.feedforward import map_chunks, scan_chunks
from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.models.products import einsum_of_rows, gradient_over_rows
from ring_attention.parallel.mesh import TENSOR


@dataclasses.dataclass(frozen=True)
class Logits:
    """How scores, products of hidden states and the unembedding, become logits.

    Attributes:
      scale: what they are multiplied by.
      softcap: they then become softcap * tanh(x / softcap); 0 leaves them.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def of(self, scores: jax.Array) -> jax.Array:
        """The logits of scores, float32 both."""
        scores = scores if self.scale == 1 else scores * self.scale
        return self.softcap * jnp.tanh(scores / self.softcap) if self.softcap else scores

    def gradient(self, logits: jax.Array, dlogits: jax.Array) -> jax.Array:
        """The gradient of the scores, given that of their logits."""
        if self.softcap:
            dlogits *= 1 - jnp.square(logits / self.softcap)
        return dlogits if self.scale == 1 else dlogits * self.scale


PLAIN = Logits()


@jax.named_scope("loss")
def chunked_cross_entropy(
    hidden_btM: jax.Array, unembed_Mv: jax.Array, targets_bt: jax.Array, *, chunk_size: int, logits: Logits = PLAIN
) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32 [b,t].

    Args:
      hidden_btM: final hidden states of this device's tokens.
      unembed_Mv: this device's columns of the unembedding.
      targets_bt: int32, over the whole vocabulary.
      chunk_size: tokens whose logits exist at once.
      logits: how logits are made of scores.
    """

    def nats(chunk):
        hidden_bcM, targets_bc = chunk
        return _cross_entropy(logits.of(_scores(hidden_bcM, unembed_Mv)), targets_bc)[0]

    return map_chunks(nats, (hidden_btM, targets_bt), axis=1, chunk_size=chunk_size)


@jax.named_scope("loss")
def weighted_cross_entropy(
    hidden_btM: jax.Array,
    unembed_Mv: jax.Array,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
    *,
    chunk_size: int,
    logits: Logits = PLAIN,
) -> jax.Array:
    """The sum over this device's tokens of weight times negative log-likelihood in nats, a float32 scalar.

    Where it is differentiated, its gradients are worked out in the forward pass, while the logits of a chunk exist:
    three products with the vocabulary, where to make the logits again would take a fourth.

    Args:
      hidden_btM, unembed_Mv, targets_bt, chunk_size, logits: as for `chunked_cross_entropy`.
      weights_bt: float32, the same on all devices of tp.
    """
    token_axes = axes_of((hidden_btM, unembed_Mv)) - {TENSOR}
    hidden_btM, unembed_Mv = vary_over((hidden_btM, unembed_Mv), token_axes | {TENSOR})
    weights_bt = vary_over(weights_bt, token_axes)
    return _weighted_sum(hidden_btM, unembed_Mv, targets_bt, weights_bt, chunk_size, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted_sum(hidden_btM, unembed_Mv, targets_bt, weights_bt, chunk_size, logits):
    options = dict(chunk_size=chunk_size, logits=logits)
    return (chunked_cross_entropy(hidden_btM, unembed_Mv, targets_bt, **options) * weights_bt).sum()


@jax.named_scope("loss")
def _weighted_sum_forward(hidden_btM, unembed_Mv, targets_bt, weights_bt, chunk_size, logits):
    def add_chunk(dunembed_Mv, chunk):
        hidden_bcM, targets_bc, weights_bc = chunk
        logits_bcv = logits.of(_scores(hidden_bcM, unembed_Mv))
        nats_bc, dlogits_bcv = _cross_entropy(logits_bcv, targets_bc)
        dscores_bcv = logits.gradient(logits_bcv, dlogits_bcv * weights_bc[..., None]).astype(unembed_Mv.dtype)
        dhidden_bcM = einsum_of_rows("bcv,mv->bcm", dscores_bcv, unembed_Mv)
        return dunembed_Mv + gradient_over_rows(hidden_bcM, dscores_bcv, jnp.float32), (nats_bc, dhidden_bcM)

    nothing = vary_over(jnp.zeros(unembed_Mv.shape, jnp.float32), axes_of(unembed_Mv))
    chunks = (hidden_btM, targets_bt, weights_bt)
    dunembed_Mv, (nats_bt, dhidden_btM) = scan_chunks(add_chunk, nothing, chunks, axis=1, chunk_size=chunk_size)
    return (nats_bt * weights_bt).sum(), (dhidden_btM, dunembed_Mv.astype(unembed_Mv.dtype), nats_bt)


@jax.named_scope("loss")
def _weighted_sum_backward(chunk_size, logits, gradients, dsum):
    dhidden_btM, dunembed_Mv, dweights_bt = ((x * dsum).astype(x.dtype) for x in gradients)
    return dhidden_btM, dunembed_Mv, None, dweights_bt


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _scores(hidden_bcM, unembed_Mv):
    return einsum_of_rows("bcm,mv->bcv", hidden_bcM, unembed_Mv, jnp.float32)


def _cross_entropy(logits_bcv, targets_bc):
    """Nats of each target, [b,c], and their gradients by the logits, [b,c,v]."""
    v = logits_bcv.shape[-1]
    top_bc = lax.pmax(lax.stop_gradient(logits_bcv.max(-1)), TENSOR)
    exp_bcv = jnp.exp(logits_bcv - top_bc[..., None])
    total_bc = lax.psum(exp_bcv.sum(-1), TENSOR)
    here_bc = targets_bc - lax.axis_index(TENSOR) * v
    mine = (here_bc >= 0) & (here_bc < v)
    index = jnp.clip(here_bc, 0, v - 1)[..., None]
    target_bc = jnp.where(mine, jnp.take_along_axis(logits_bcv, index, axis=-1)[..., 0], 0.0)
    nats_bc = jnp.log(total_bc) + top_bc - lax.psum(target_bc, TENSOR)
    return nats_bc, exp_bcv / total_bc[..., None] - jax.nn.one_hot(here_bc, v)
