"""A few steps of a toy on 8 simulated devices, for tests and for trying out a change.

    python train.py --config=configs/tiny.py

Cost: under a minute on two CPU cores, nearly all of it compilation. Result: 5.6 bits per byte, worse than
counting bytes (5.3): twelve steps teach it nothing.
"""

from ring_attention.models.config import ModelConfig
from ring_attention.training.config import AttentionConfig, MeshConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    """Every part of the real thing, none of the size: packed documents, grouped queries, a mesh of three axes."""
    return TrainConfig(
        name="tiny",
        model=ModelConfig(
            vocab_size=264,
            num_layers=2,
            model_dim=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            ffn_dim=64,
            ffn_chunk=24,
            loss_chunk=40,
        ),
        seq_len=256,
        batch_size=2,
        num_steps=12,
        mesh=MeshConfig(fsdp=2, sp=2, tp=2),
        attention=AttentionConfig(block_q=32, block_kv=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        log_every=2,
        eval_every=6,
        eval_sequences=4,
        checkpoint_every=4,
    )
