"""How the next token of each row is chosen from its scores."""

import dataclasses

import jax
import jax.numpy as jnp

from ring_attention.checks import is_number, is_whole, require, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: which tokens may come, and with what weight.

    Attributes:
      temperature: scores are divided by it; 0 takes the likeliest token, and the others then mean nothing.
      top_k: only the so many likeliest tokens (and those level with the last of them); 0 for all.
      top_p: only the likeliest of these whose probabilities make up this much, at least one (Holtzman et al. 2020);
        1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        fits = is_number(self.temperature) and 0 <= self.temperature < float("inf")
        got = f"temperature={shown(self.temperature)}"
        require(fits, f"{got} must be a number, 0 or more; 0 takes the likeliest token, 1 samples as the model says")
        got = f"top_k={shown(self.top_k)}"
        require(is_whole(self.top_k, 0), f"{got} must be a whole number of tokens; 0 leaves all in")
        fits = is_number(self.top_p) and 0 < self.top_p <= 1
        require(fits, f"top_p={shown(self.top_p)} must be more than 0 and at most 1; 1 leaves all in")
        unused = [f"{name}={getattr(self, name)!r}" for name in ("top_k", "top_p") if self._is_set(name)]
        require(
            self.temperature > 0 or not unused,
            f"{' and '.join(unused)} with temperature=0, which takes the likeliest token; set temperature=1, say",
        )

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != getattr(Sampling, name)


def sample(sampling: Sampling, logits_BV: jax.Array, seeds_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Choose the next token of each row, int32 [B].

    What is drawn follows from the row's scores, its seed and the position of the new token alone: neither the other
    rows nor the mesh matter, but for the rounding of the scores.

    Args:
      sampling: how.
      logits_BV: float32; -inf for tokens that must not come.
      seeds_B: uint32.
      positions_B: int32, of the new tokens.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = _top_p(_top_k(logits_BV / sampling.temperature, sampling.top_k), sampling.top_p)

    def draw(logits_V, seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(logits_BV, seeds_B, positions_B).astype(jnp.int32)


def _top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    least_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    if p == 1:
        return logits_BV
    falling_BV = -jnp.sort(-logits_BV, axis=-1)
    share_BV = jax.nn.softmax(falling_BV, axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV  # what the likelier ones make up; 0 for the first
    least_B1 = jnp.min(jnp.where(before_BV < p, falling_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
