"""Make a small Hugging Face checkpoint with random weights, to try the other scripts without a download.

  python scripts/make_small_hf.py --out=small-hf
  python scripts/make_small_hf.py --out=small-qwen --family=qwen3

Two and a half million parameters, 1,024 tokens of context, and a tokenizer of 4,096 tokens, trained on the Python
standard library's source. It takes a few seconds and needs neither torch nor transformers. The model knows nothing;
it is for seeing every step from a folder to a fine-tuned folder work.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import tokenizers
from flax import nnx

from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.data.config import DataConfig
from ring_attention.data.sources import open_documents
from ring_attention.models.hf.config import FAMILIES, HFConfig, config_from_hf
from ring_attention.models.hf.export import write_standard
from ring_attention.models.hf.manifest import TOKENIZER
from ring_attention.models.transformer import Transformer
from ring_attention.training.hf_conversion import new_folder

VOCABULARY, WINDOW = 4096, 1024
DOCUMENTS = 100
"""Files that the tokenizer is trained on."""

SMALL = dict(
    vocab_size=VOCABULARY,
    num_hidden_layers=4,
    hidden_size=192,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=512,
    max_position_embeddings=WINDOW,
    tie_word_embeddings=True,
)
"""Keys of config.json; the rest is as the family has it where it is absent."""

YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=WINDOW // 4)
OF_FAMILIES = {"ministral3": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, "olmo3": {"rope_theta": 5e5}}
"""Further keys of families that need them."""


def main(argv: list[str]) -> None:
    """Train the tokenizer, draw the weights, write the folder."""
    args = parse(argv)
    jax.config.update("jax_platforms", "cpu")
    config = small_config(args.family)
    model = config.transformer
    with new_folder(args.out, 4 * model.num_parameters, "--out") as partial:
        start = write_tokenizer(partial)
        params = nnx.to_pure_dict(nnx.state(Transformer(model, nnx.Rngs(args.seed)), nnx.Param))
        tokens = {"bos_token_id": start, "eos_token_id": start}
        write_standard(params, config, args.dtype, partial, lambda name, size: None, extra=tokens)
    print(f"Written: {args.out}, {args.family}, {model.num_parameters:,} random parameters.")


def small_config(family: str) -> HFConfig:
    """Return a small model of a family; layers that have a window unless they are told otherwise see 256 tokens."""
    row = FAMILIES[family]
    values = SMALL | {"model_type": family, "architectures": [row.architecture]}
    if "sliding_window" in row.defaults:
        values["sliding_window"] = WINDOW // 4
    return config_from_hf(values | OF_FAMILIES.get(family, {}))


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="to write; new or empty")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser.parse_args(argv)


def write_tokenizer(out: Path) -> int:
    """Train a byte-level BPE on the standard library's source; returns the id that opens a document."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = itertools.islice(open_documents(DataConfig()), DOCUMENTS)
    made.train_from_iterator((document.text.decode() for document in documents), trainer)
    start = made.token_to_id("<s>")
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    made.save(str(out / TOKENIZER))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<s>",
        "model_max_length": WINDOW,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return start
