"""Gemma 3 27B at 1,048,576 tokens of context: 62 layers, of which every sixth attends to everything before a token.

    python train.py --config=configs/gemma3_27b.py \
        --config.data.paths='/data/books/*.jsonl.gz' --config.data.tokenizer=/data/tokenizer.json

The other 52 layers have a window of 1,024 tokens. Their keys go to the next device and no farther, the ends of a
device's two chunks: 0.6% of what a step sends, and 1.0% of attention's part of that (docs/planner.md).

Cost: 31.6 GiB of each chip's 95.7 on 128 chips of TPU v5p, as the compiler for the pod says without the pod:

    pip install -e '.[compile-tpu]'
    python scripts/plan.py --config=configs/gemma3_27b.py --topology=v5p:4x4x8 --compile

On 64 H100 (h100:8x8) 39 GiB are predicted. On the pod the same command runs on every host (docs/pods.md).
Result: not trained yet; compiled and planned only.
"""

from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.rope import RopeConfig
from ring_attention.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig

LOCAL = LayerKind(window=1024, rope=RopeConfig(theta=10_000.0))
GLOBAL = LayerKind()


def get_config() -> TrainConfig:
    """The text part of Gemma 3 27B; one sequence a step, 8192 tokens of it on each of 128 devices."""
    return TrainConfig(
        name="gemma3_27b",
        model=ModelConfig(
            vocab_size=262_208,
            num_layers=62,
            model_dim=5376,
            num_heads=32,
            num_kv_heads=16,
            head_dim=128,
            ffn_dim=21_504,
            layers=(*[LOCAL] * 5, GLOBAL),
            rope=RopeConfig(theta=1_000_000.0, scaling="linear", factor=8.0),
            attention_scale=168**-0.5,
            norm_place="both",
            norm_zero_centered=True,
            norm_epsilon=1e-6,
            activation="gelu_tanh",
            embedding_scale=5376**0.5,
            tied_embeddings=True,
            qk_norm=True,
            compute_dtype="bfloat16",
            ffn_chunk=1024,
            loss_chunk=1024,
        ),
        seq_len=1_048_576,
        batch_size=1,
        num_steps=10_000,
        mesh=MeshConfig(sp=-1),
        data=DataConfig(paths="data/*.jsonl.gz", tokenizer="tokenizer.json"),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=500),
        eval_every=500,
        eval_sequences=4,
        checkpoint_every=250,
    )
