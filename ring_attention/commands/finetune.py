r"""Fine-tune a Hugging Face checkpoint on your own documents: from its folder to another that transformers loads.

  python scripts/finetune.py Llama-3.2-1B --data='docs/**/*.txt' --out=Llama-on-docs
  python scripts/finetune.py Llama-3.2-1B --data='books/*.jsonl.gz' --out=Llama-32k --config.seq_len=32768 \
      --config.model.rope.theta=2e6 --config.num_steps=500 --config.model.compute_dtype=bfloat16

The model's shape comes from the checkpoint's config.json and the tokens from its tokenizer.json; then train.py's own
path runs, in a folder of its own (OUT-run; metrics, checkpoints, a plot of the losses), and the result is exported with
the checkpoint's own files, names and dtypes. After an interruption the same command goes on. Any field of the config
can be set; `python train.py --help` lists them. By default: 100 steps of one sequence as long as the model's window,
8,192 tokens at most, at a learning rate of 2e-5.
"""

import argparse
import dataclasses
from pathlib import Path

from ring_attention.checks import local_path, require_field
from ring_attention.commands.arguments import Parser
from ring_attention.evaluation.report import report
from ring_attention.models.hf.manifest import TOKENIZER
from ring_attention.models.hf.source import Source, open_source
from ring_attention.training.config import OptimizerConfig, TrainConfig
from ring_attention.training.devices import open_mesh
from ring_attention.training.flags import override
from ring_attention.training.hf_conversion import export_config, export_hf, exported_bytes, require_new
from ring_attention.training.init_from import find_initial
from ring_attention.training.processes import ProcessFlags
from ring_attention.training.progress import tensor_progress
from ring_attention.training.run import open_run, train
from ring_attention.training.run_folder import folder_of
from ring_attention.training.trained_model import config_of, open_trained_model

MOST_TOKENS = 8192
"""Length of a sequence where none is asked for, at most: what a laptop holds."""


ALONE = ProcessFlags(coordinator_address="127.0.0.1:1", num_processes=1, process_id=0)
"""One process trains and exports, also inside a cluster's job."""


def main(argv: list[str]) -> None:
    """Check everything, train, export."""
    args, flags = parse(argv)
    source = open_source(args.folder)
    config = override(default_config(source, args), flags)
    need, remedy = (
        f"is what the run begins with, rather than {args.folder}",
        "leave it out, or give it in that one's place",
    )
    require_field(config.init_from == str(args.folder), "init_from", config.init_from, need, remedy)
    require_new(args.out, "--out")
    find_initial(config)  # what the flags contradict costs its line now, not after training
    export_config(config, source.values)
    with open_run(config, ALONE) as opened:
        report(opened, train(opened))
    trained = open_trained_model(str(folder_of(config).path))
    with tensor_progress("Writing", exported_bytes(trained)) as progress:
        export_hf(trained, args.out, open_mesh(config.mesh), progress)
    print(f"Written: {args.out}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those that are the config's."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=local_path, help="of a Hugging Face checkpoint")
    parser.add_argument("--data", required=True, metavar="GLOBS", help="your documents: text or JSONL, as data.paths")
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="to write; new or empty")
    return parser.parse_known_args(argv)


def default_config(source: Source, args: argparse.Namespace) -> TrainConfig:
    """Return the config of the run, but for what the flags change."""
    config = config_of(source.path, source.config)
    tokenizer = Path(config.data.tokenizer)
    require_field(
        tokenizer.is_file(),
        "folder",
        str(args.folder),
        f"holds no {TOKENIZER}, the only form of tokenizer that is read",
        "save it with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )
    return dataclasses.replace(
        config,
        name=args.out.absolute().name,
        run_dir=str(args.out.absolute().with_name(f"{args.out.absolute().name}-run")),
        init_from=str(args.folder),
        seq_len=min(config.seq_len, MOST_TOKENS),
        num_steps=100,
        data=dataclasses.replace(config.data, paths=args.data, holdout_fraction=0.1),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=5, weight_decay=0.0),
        eval_every=50,
        eval_sequences=1,
        checkpoint_every=50,
    )
