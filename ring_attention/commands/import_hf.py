"""Import a Hugging Face checkpoint of a family in docs/long_context.md, from a local folder of safetensors files.

  python scripts/import_hf.py Llama-3.2-1B --out=runs/llama
  python train.py --config=configs/NAME.py --config.init_from=runs/llama ...
  python scripts/export_hf.py runs/llama --out=Llama-again

The folder that is written is like that of a run: config.json with the model's shape, a checkpoint of the parameters in
float32 with fingerprints, and, in hf/, what is needed to write the same files again. All that is in the checkpoint's
config.json and not implemented is refused by name. Tensors are read one at a time, straight onto the devices that JAX
finds; without accelerators, into the host's memory: 4 bytes a parameter. docs/long_context.md says more.
"""

import argparse
import collections

import jax

from ring_attention.checks import local_path, printable
from ring_attention.commands.arguments import Parser
from ring_attention.models.hf.facts import kinds_by_layer
from ring_attention.models.hf.source import Source, open_source
from ring_attention.parallel.mesh import make_mesh
from ring_attention.training.hf_conversion import import_hf
from ring_attention.training.progress import tensor_progress


def main(argv: list[str]) -> None:
    """Check the folder, then copy it."""
    args = parse(argv)
    source = open_source(args.folder)
    print(describe(source))
    if source.config.wrapper:
        print(
            f"Of the {source.config.wrapper} model the text part alone: {len(source.left_out)} tensors of other parts "
            "are kept beside it for export_hf.py, and take part in nothing else."
        )
    with tensor_progress("Reading", source.tensor_bytes) as progress:
        kept = import_hf(source, args.out, make_mesh(sp=jax.device_count()), progress)
    for name in kept.left_out:
        print(f"Left out: {printable(name)}, which export_hf.py will not write again.")
    print(f"Written: {args.out}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=local_path, help="with config.json and safetensors files")
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="to write; new or empty")
    return parser.parse_args(argv)


def describe(source: Source) -> str:
    """Return a line that says which model this is."""
    config, model = source.config, source.config.model
    dtypes = ", ".join(sorted({stored.dtype for stored in source.stored.values()}))
    parts = [f"{config.max_len:,} tokens of context", f"{len(source.files)} files of {dtypes}"]
    parts += [f"rotary scaling {model.rope.scaling}"] if model.rope.scaling != "none" else []
    windows = collections.Counter(kind.reach for kind in kinds_by_layer(config.transformer))
    parts += [
        f"window {window:,}"
        if count == model.num_layers
        else f"window {window:,} in {count} of {model.num_layers} layers"
        for window, count in windows.items()
        if window
    ]
    return f"{source.path}: {config.family}, {model.num_parameters:,} parameters, {', '.join(parts)}."
