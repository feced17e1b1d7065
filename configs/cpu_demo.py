"""The default: 4096 tokens of context over 8 simulated devices, on the Python standard library's own source.

    python train.py

Cost: about three and a half minutes on two CPU cores.
"""

from ring_attention.models.config import ModelConfig
from ring_attention.training.config import MeshConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    """A byte-level model small enough to learn something in minutes."""
    return TrainConfig(
        name="cpu_demo",
        model=ModelConfig(
            vocab_size=264,
            num_layers=2,
            model_dim=192,
            num_heads=3,
            num_kv_heads=1,
            head_dim=64,
            ffn_dim=512,
        ),
        seq_len=4096,
        batch_size=1,
        num_steps=300,
        mesh=MeshConfig(sp=8),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, final_fraction=0.05),
        eval_every=100,
        eval_sequences=32,
        checkpoint_every=100,
    )
