"""Llama 2 7B stretched from 4,096 to 32,768 tokens on a TPU v5e pod of 256 chips: the first stage of Large World Model.

    python train.py --config=configs/lwm_7b.py --config.data.paths='/data/books/*.jsonl.gz'

The parameters are read from the Hugging Face folder Llama-2-7b-hf, each host its shards; theta of the rotary embedding
grows with the window. docs/long_context.md has the later stages, up to 1,048,576 tokens.

Cost: 6.6 GiB of each chip's 15.75 and 14 seconds a step, predicted:

    python scripts/plan.py --config=configs/lwm_7b.py --topology=v5e:16x16

Result: not trained yet; planned only.
"""

from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig

LLAMA = "Llama-2-7b-hf"


def get_config() -> TrainConfig:
    """Llama 2 7B; 128 sequences of 32,768 tokens a step, 32 at once, 4096 tokens of one on each chip."""
    return TrainConfig(
        name="lwm_7b",
        init_from=LLAMA,
        model=ModelConfig(
            vocab_size=32_000,
            num_layers=32,
            model_dim=4096,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            ffn_dim=11_008,
            rope=RopeConfig(theta=1_000_000.0),
            norm_epsilon=1e-5,
            compute_dtype="bfloat16",
            ffn_chunk=1024,
            loss_chunk=1024,
        ),
        seq_len=32_768,
        batch_size=128,
        num_steps=1000,
        mesh=MeshConfig(fsdp=32, sp=8),
        data=DataConfig(paths="data/*.jsonl.gz", tokenizer=f"{LLAMA}/tokenizer.json"),
        optimizer=OptimizerConfig(
            learning_rate=4e-5, warmup_steps=100, final_fraction=0.1, weight_decay=0.0, accumulation_steps=4
        ),
        eval_every=200,
        eval_sequences=32,
        checkpoint_every=200,
    )
