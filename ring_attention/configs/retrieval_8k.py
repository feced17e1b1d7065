"""The second stage: the same model finds one key among 8,192 bytes, on a ring of 8 simulated devices.

    python scripts/make_retrieval_data.py --out=data/far.jsonl --shortest=512 --longest=8192 --documents=6000
    python train.py --config=configs/retrieval_8k.py
    python scripts/evaluate.py needle --checkpoint=runs/retrieval_8k --lengths=1024,2048,4096,8192 --samples=32

It begins with what configs/retrieval_near.py has learned. Nine minutes on two cores, and two for the evaluation: every
key of 8,192 tokens is right. docs/retrieval.md has the picture, and the control: a window of 1,024 tokens, which fails.
"""

from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.training.config import AttentionConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    """The model of retrieval_near; a row holds about four documents, or one."""
    return TrainConfig(
        name="retrieval_8k",
        init_from="runs/retrieval_near",
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
        seq_len=8192,
        batch_size=1,
        num_steps=1000,
        mesh=MeshConfig(sp=8),
        attention=AttentionConfig(block_q=128, block_kv=128),
        data=DataConfig(paths="data/far.jsonl"),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, final_fraction=0.1, weight_decay=0.0),
        eval_every=200,
        eval_sequences=4,
        checkpoint_every=200,
    )
