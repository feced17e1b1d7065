from ring_attention.checks import require_packages

require_packages(
    __name__, "absl", "flax", "matplotlib", "ml_collections", "optax", "orbax", "rich", "tensorboardX", "tokenizers"
)
