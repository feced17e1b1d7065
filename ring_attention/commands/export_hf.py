"""Export a model to a folder that transformers loads: an import, or a run of train.py.

  python scripts/export_hf.py runs/books --out=books-hf
  python scripts/export_hf.py runs/cpu_demo --out=demo-hf --dtype=bfloat16
  python scripts/export_hf.py runs/books/checkpoints/400 --out=books-400-hf

A model that came from a Hugging Face checkpoint (an import, or a run with init_from) is written as that one was: the
same files, names, order and dtypes, with new values; config.json changes where the rotary scaling, the window or the
length did. An import that was not trained gives the same bytes. Any other model becomes a checkpoint of its own:
config.json, a tokenizer, and safetensors files of at most 5 GB in --dtype.
"""

import argparse

import jax

from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.models.hf.export import DTYPE_NAMES
from ring_attention.parallel.mesh import make_mesh
from ring_attention.training.hf_conversion import NEW_DTYPE, export_hf, exported_bytes
from ring_attention.training.progress import tensor_progress
from ring_attention.training.trained_model import open_trained_model


def main(argv: list[str]) -> None:
    """Read the parameters, write the files."""
    args = parse(argv)
    trained = open_trained_model(str(args.folder))
    print(f"{trained.checkpoint}: {trained.config.transformer.num_parameters:,} parameters.")
    with tensor_progress("Writing", exported_bytes(trained, args.dtype)) as progress:
        export_hf(trained, args.out, make_mesh(sp=jax.device_count()), progress, args.dtype)
    print(f"Written: {args.out}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=local_path, help="of an import or a run, or one of its checkpoints")
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="to write; new or empty")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPE_NAMES),
        help=f"of a model that came from no checkpoint; {NEW_DTYPE} by default, the values as they are",
    )
    return parser.parse_args(argv)
