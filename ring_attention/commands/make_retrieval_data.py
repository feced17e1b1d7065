"""Write documents that teach a model to retrieve: filler with hidden needles, and a question about one at the end.

  python scripts/make_retrieval_data.py --out=data/near.jsonl --shortest=20 --longest=64 --documents=60000
  python train.py --config=configs/retrieval_near.py
  python scripts/make_retrieval_data.py --out=data/far.jsonl --shortest=512 --longest=8192 --documents=6000
  python train.py --config=configs/retrieval_8k.py

One JSON object with the field "text" a line. Lengths, in characters, have a density proportional to length**-1.4, and
needles lie at random depths, the very beginning and the very end among them. A small model learns to look back from
short documents, packed many to a row, and then carries that to long ones; from long ones alone it learns nothing:
their answers are too few among the filler.
"""

import argparse
import json

import numpy as np

from ring_attention.checks import ConfigError, local_path, shown
from ring_attention.commands.arguments import Parser, as_mistakes
from ring_attention.evaluation.model_source import require_positive
from ring_attention.evaluation.needles import STYLES, draw_length, shortest_text, training_document


def main(argv: list[str]) -> None:
    """Check the flags, write the file."""
    args = parse(argv)
    style, rng = STYLES[args.key], np.random.default_rng(args.seed)
    characters = 0
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w") as file:
            for _ in range(args.documents):
                length = draw_length(args.shortest, args.longest, rng)
                text = training_document(style, length, rng, needles=args.needles)
                file.write(json.dumps({"text": text}) + "\n")
                characters += len(text)
    except OSError as error:
        raise ConfigError(f"out={shown(str(args.out))}: cannot be written ({error.strerror}); name another") from error
    print(
        f"Written: {args.out}, {args.documents:,} documents, {characters / args.documents:,.0f} characters on average"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags and check them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE", help="to write, .jsonl")
    parser.add_argument("--shortest", type=int, default=20, help="characters of a document")
    parser.add_argument("--longest", type=int, default=8192, help="characters of a document")
    parser.add_argument("--documents", type=int, required=True, help="how many")
    parser.add_argument("--needles", type=int, default=1, help="in each; with several, each has a name")
    parser.add_argument("--key", default="letters", help=f"how texts are worded: {' or '.join(STYLES)}")
    parser.add_argument("--seed", type=int, default=0, help="of the documents")
    args = parser.parse_args(argv)
    require_positive(documents=args.documents)
    if args.key not in STYLES:
        raise ConfigError(f"key={shown(args.key)}: is not known; choose one of {', '.join(STYLES)}")
    if args.seed < 0:
        raise ConfigError(f"seed={args.seed}: must not be negative; choose another")
    with as_mistakes(ValueError):
        least = shortest_text(STYLES[args.key], args.needles)
    if args.shortest < least:
        raise ConfigError(f"shortest={args.shortest}: needles and question take {least} characters; use at least that")
    if args.longest < args.shortest:
        raise ConfigError(f"longest={args.longest}: is less than shortest={args.shortest}; give more")
    return args
