"""AdamW with warm-up, cosine decay and clipping, from optax."""

import jax
import optax

from ring_attention.training.config import TrainConfig


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of each update: a linear warm-up, then a cosine down to `final_fraction` of the peak."""
    optimizer = config.optimizer
    first = optimizer.learning_rate / (optimizer.warmup_steps + 1)  # at 0 the first update would be wasted
    return optax.warmup_cosine_decay_schedule(
        init_value=first,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=config.num_steps,
        end_value=optimizer.learning_rate * optimizer.final_fraction,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; matrices decay, norms and biases do not."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            mask=lambda params: jax.tree.map_with_path(_decays, params),
        ),
    )


def _decays(path, _) -> bool:
    return not any(word in str(key) for key in path for word in ("norm", "bias"))
