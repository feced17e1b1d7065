"""A 7B-class model at 2,097,152 tokens of context on a TPU v5e pod of 256 chips.

    python train.py --config=configs/tpu_v5e_256_7b.py \
        --config.data.paths='/data/books/*.jsonl.gz' --config.data.tokenizer=/data/tokenizer.json

Cost: 8.4 GiB of each chip's 15.75, as the compiler for the pod says without the pod:

    pip install -e '.[compile-tpu]'
    python scripts/plan.py --config=configs/tpu_v5e_256_7b.py --topology=v5e:16x16 --compile

On the pod the same command runs on every host (docs/pods.md). Result: not trained yet; compiled and planned only.
"""

from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    """Llama 2 7B with grouped queries, 5.9B parameters; one sequence a step, 8192 tokens of it on each chip."""
    return TrainConfig(
        name="tpu_v5e_256_7b",
        model=ModelConfig(
            vocab_size=32_768,
            num_layers=32,
            model_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            ffn_dim=11_008,
            rope=RopeConfig(theta=50_000_000.0),
            compute_dtype="bfloat16",
            ffn_chunk=1024,
            loss_chunk=1024,
        ),
        seq_len=2_097_152,
        batch_size=1,
        num_steps=10_000,
        mesh=MeshConfig(sp=256),
        data=DataConfig(paths="data/*.jsonl.gz", tokenizer="tokenizer.json"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=500),
        eval_every=500,
        eval_sequences=4,
        checkpoint_every=250,
    )
