"""The first of two stages that teach a small model to retrieve: short documents, in which what is asked for is near.

    python scripts/make_retrieval_data.py --out=data/near.jsonl --shortest=20 --longest=64 --documents=60000
    python train.py --config=configs/retrieval_near.py

configs/retrieval_8k.py goes on from here. theta is large from the start: few pairs of each head then turn within the
context, so that what a key says can be found at any distance.

One minute on two cores.
"""

from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.training.config import AttentionConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    """Two layers on bytes; some 57 documents are packed into each row."""
    return TrainConfig(
        name="retrieval_near",
        model=ModelConfig(
            vocab_size=264,
            num_layers=2,
            model_dim=64,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            ffn_dim=192,
            rope=RopeConfig(theta=1e8),
            remat="none",
        ),
        seq_len=2048,
        batch_size=1,
        num_steps=800,
        mesh=MeshConfig(sp=1),
        attention=AttentionConfig(block_q=128, block_kv=128),
        data=DataConfig(paths="data/near.jsonl"),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20, final_fraction=0.2, weight_decay=0.0),
        eval_every=200,
        eval_sequences=4,
        checkpoint_every=400,
    )
