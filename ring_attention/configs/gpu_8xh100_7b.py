"""A 7B-class model at 262,144 tokens of context on one host with 8 H100 GPUs.

    python train.py --config=configs/gpu_8xh100_7b.py \
        --config.data.paths='/data/books/*.jsonl.gz' --config.data.tokenizer=/data/tokenizer.json

Cost: 33 GiB of each GPU's 73 (0.92 of 79), as the compiler for H100 says without a GPU:

    pip install -e '.[compile-gpu]'
    python scripts/plan.py --config=configs/gpu_8xh100_7b.py --topology=h100:1x8 --compile

Result: not trained yet. The blocks of the ring are computed by cuDNN's flash attention where it passes its self-test.
"""

from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    """Llama 2 7B with grouped queries, 5.9B parameters; one sequence a step, 32,768 tokens of it on each GPU."""
    return TrainConfig(
        name="gpu_8xh100_7b",
        model=ModelConfig(
            vocab_size=32_768,
            num_layers=32,
            model_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            ffn_dim=11_008,
            rope=RopeConfig(theta=5_000_000.0),
            compute_dtype="bfloat16",
            ffn_chunk=4096,
            loss_chunk=2048,
        ),
        seq_len=262_144,
        batch_size=1,
        num_steps=10_000,
        mesh=MeshConfig(sp=8),
        data=DataConfig(paths="data/*.jsonl.gz", tokenizer="tokenizer.json"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=500),
        eval_every=500,
        eval_sequences=8,
        checkpoint_every=250,
    )
