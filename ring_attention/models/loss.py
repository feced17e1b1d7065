"""Cross-entropy a chunk of tokens at a time, so that no [tokens, vocabulary] array ever exists."""

import jax
import jax.numpy as jnp
from jax import lax

from ring_attention.attention.feedforward import map_chunks
from ring_attention.models.products import einsum_of_rows
from ring_attention.parallel.mesh import TENSOR


@jax.named_scope("loss")
def chunked_cross_entropy(
    hidden_btM: jax.Array, unembed_Mv: jax.Array, targets_bt: jax.Array, *, chunk_size: int
) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32 [b,t]; for use inside a `shard_map` over the mesh.

    Args:
      hidden_btM: final hidden states of this device's tokens.
      unembed_Mv: this device's columns of the unembedding: the vocabulary is sharded over tp.
      targets_bt: int32, over the whole vocabulary.
      chunk_size: tokens whose logits exist at once.
    """
    v = unembed_Mv.shape[1]
    first = lax.axis_index(TENSOR) * v

    def nats(chunk):
        hidden_bcM, targets_bc = chunk
        logits_bcv = einsum_of_rows("bcm,mv->bcv", hidden_bcM, unembed_Mv, jnp.float32)
        top_bc = lax.pmax(lax.stop_gradient(logits_bcv.max(-1)), TENSOR)
        total_bc = lax.psum(jnp.exp(logits_bcv - top_bc[..., None]).sum(-1), TENSOR)
        here_bc = targets_bc - first
        mine = (here_bc >= 0) & (here_bc < v)
        index = jnp.clip(here_bc, 0, v - 1)[..., None]
        target_bc = jnp.where(mine, jnp.take_along_axis(logits_bcv, index, axis=-1)[..., 0], 0.0)
        return jnp.log(total_bc) + top_bc - lax.psum(target_bc, TENSOR)

    return map_chunks(nats, (hidden_btM, targets_bt), axis=1, chunk_size=chunk_size)
