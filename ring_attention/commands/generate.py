r"""Continue prompts with a trained model, over one device or many.

  python scripts/generate.py --checkpoint=runs/cpu_demo --prompt='def main(' --max_new_tokens=200
  python scripts/generate.py --checkpoint=runs/long --prompt_file=book.txt --sp=8 --temperature=0.8 --top_p=0.95
  python scripts/generate.py --checkpoint=runs/long --prompt_file=questions.jsonl --stop="\n\n"

One prompt is continued as the text comes. A .jsonl file holds one prompt a line, a string or an object with the field
"prompt" or "text"; they are continued --batch_size at a time, and printed when all of these have ended. The text goes
to stdout, all else to stderr. Special tokens that a prompt spells out, such as <|im_start|>, are read as tokens
(--plain_text: as text); those in a continuation are not printed (--show_special_tokens). docs/generation.md says how
it works.
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ring_attention.checks import ConfigError, printable, require_field, shown
from ring_attention.commands.arguments import Parser, as_mistakes
from ring_attention.data.tokenizers import Tokenizer, load_tokenizer
from ring_attention.inference.ends import end_tokens, prompt_start
from ring_attention.inference.generator import Generator
from ring_attention.inference.sampling import Sampling
from ring_attention.inference.text import TextStream
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.parallel.strategies import STRATEGIES
from ring_attention.training.attention_config import STRATEGY_OPTIONS
from ring_attention.training.config import MeshConfig
from ring_attention.training.trained_model import TrainedModel, open_trained_model

EXACT = [name for name, strategy in STRATEGIES.items() if strategy.exact]


class Prompt(NamedTuple):
    """A prompt: its name in messages, and its tokens, int32 [T]."""

    name: str
    tokens: np.ndarray


def main(argv: list[str]) -> None:
    """Read the prompts and the model, continue, print."""
    args = parse(argv)
    texts = read_prompts(args)
    trained = open_model(args)
    tokenizer = load_tokenizer(args.tokenizer or trained.config.data.tokenizer)
    ends = sorted({*end_tokens(trained, tokenizer), *special_stops(args.stop, tokenizer)})
    start = [] if args.no_document_start else prompt_start(trained, tokenizer)
    encode = functools.partial(encode_prompt, tokenizer=tokenizer, special_tokens=not args.plain_text)
    prompts = [Prompt(name, np.concatenate([start, encode(text, name)]).astype(np.int32)) for name, text in texts]
    twice = [prompt.name for prompt in prompts if start and prompt.tokens[len(start) :][: len(start)].tolist() == start]
    if twice:
        say(f"Note: {twice[0]} begins with the token that is put before it, too; --no_document_start leaves one out.")
    longest = max(prompt.tokens.size for prompt in prompts)
    capacity = longest + args.max_new_tokens if args.capacity is None else args.capacity
    writer = open_generator(args, trained, tokenizer, capacity)
    if capacity > trained.config.seq_len:
        say(f"Note: up to {capacity:,} tokens, but the model was trained on sequences of {trained.config.seq_len:,}.")
    rows = args.batch_size if is_file_of_many(args) else 1
    for first in range(0, len(prompts), rows):
        continue_prompts(writer, tokenizer, prompts[first : first + rows], args, ends, seed=args.seed + first)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags and check them."""
    usage = "%(prog)s --checkpoint=FOLDER (--prompt=TEXT | --prompt_file=FILE) [flags, see --help]"
    parser = Parser(description=__doc__, usage=usage)

    def flag(name: str, **settings) -> None:
        parser.add_argument(f"--{name}", **settings)

    flag(
        "checkpoint", required=True, help="folder of a run, of one of its checkpoints, or of a Hugging Face checkpoint"
    )
    flag("prompt", help="the text to continue")
    flag("prompt_file", help="a file that holds it (one line break at its end is left out), or .jsonl, one a line")
    flag("max_new_tokens", type=int, default=256, help="of each continuation")
    flag("temperature", type=float, default=0.0, help="0 (default): the likeliest token; 1: as the model says")
    flag("top_k", type=int, default=0, help="only the likeliest so many tokens; 0: all")
    flag("top_p", type=float, default=1.0, help="only the likeliest that make up so much of the probability")
    flag("seed", type=int, default=0, help="of sampling; prompts of a file have seed, seed+1, ...")
    flag("stop", action="append", default=[], help="a text that ends a continuation (\\n is a line break); repeatable")
    flag("chunk", type=int, help="tokens of a prompt that are read at once; by default all of them")
    flag("capacity", type=int, help="tokens that the cache has room for; by default what is needed")
    flag("batch_size", type=int, default=8, help="prompts of a .jsonl file that are continued together")
    flag("tokenizer", help="path of tokenizer.json, where it is not where the run found it")
    flag("no_document_start", action="store_true", help="do not open prompts with the token that opens documents")
    flag("plain_text", action="store_true", help="read special tokens that a prompt spells out as text")
    flag("show_special_tokens", action="store_true", help="print the special tokens of continuations, too")
    flag("dtype", choices=("float32", "bfloat16"), help="of weights, cache and products; by default the run's")
    flag("dp", type=int, default=1, help="devices that share the prompts")
    flag("sp", type=int, help="devices of the ring; by default all accelerators, or one CPU device")
    flag("tp", type=int, default=1, help="devices that share the heads")
    flag("strategy", help=f"that reads the prompts, by default the run's: {', '.join(EXACT)}")
    args = parser.parse_args(argv)
    given = [name for name in ("prompt", "prompt_file") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"got {' and '.join(given) or 'no prompt'}, need one; give --prompt=TEXT or --prompt_file=FILE"
        )
    require_field(0 <= args.seed < 2**32, "seed", args.seed, "must lie in [0, 2**32)", "choose another")
    require_field(all(args.stop), "stop", "", "would end everything at once", "leave it out")
    for name in ("max_new_tokens", "batch_size"):
        require_field(getattr(args, name) > 0, name, getattr(args, name), "must be positive", "give at least 1")
    return args


def is_file_of_many(args: argparse.Namespace) -> bool:
    """Return whether the prompts are the lines of a file."""
    return args.prompt_file is not None and args.prompt_file.lower().endswith((".jsonl", ".ndjson"))


def read_prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(what it is called, its text) of each prompt."""
    if args.prompt_file is None:
        return [("prompt", args.prompt)]
    name = printable(args.prompt_file)
    try:
        text = Path(args.prompt_file).read_bytes().decode().removeprefix("\N{BYTE ORDER MARK}")
    except OSError as error:
        raise ConfigError(f"prompt_file={name}: cannot be read ({error.strerror}); give the path of a file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt_file={name}: byte {error.start} is not UTF-8; convert the file") from error
    if not is_file_of_many(args):
        return [(name, re.sub(r"\r?\n\Z", "", text))]
    lines = [(f"{name}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    require_field(bool(lines), "prompt_file", args.prompt_file, "holds no line", "write one prompt on each")
    return [(where, prompt_of(where, line)) for where, line in lines]


def prompt_of(where: str, line: str) -> str:
    """Return the prompt on a line of JSON."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is no JSON ({error}); write a string or an object") from error
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise ConfigError(f'{where}: is neither a string nor an object with "prompt" or "text"; write one of them')
    return value


def encode_prompt(text: str, where: str, *, tokenizer: Tokenizer, special_tokens: bool) -> np.ndarray:
    """Tokens of a prompt."""
    if not text:
        raise ConfigError(f"{where}: is empty; write at least a character")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 at character {error.start}; write it in UTF-8") from error
    return tokenizer.encode(data, special_tokens=special_tokens)


def special_stops(stops: list[str], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of stop texts that are special tokens, which the text leaves out."""
    return [token for token, name in tokenizer.special_tokens.items() if name in stops]


def open_model(args: argparse.Namespace) -> TrainedModel:
    """Return the trained model, to be computed in the dtype that was asked for."""
    trained = open_trained_model(args.checkpoint)
    if args.dtype is None:
        return trained
    model = dataclasses.replace(trained.config.model, compute_dtype=args.dtype)
    return dataclasses.replace(trained, config=dataclasses.replace(trained.config, model=model))


def open_generator(args: argparse.Namespace, trained: TrainedModel, tokenizer: Tokenizer, capacity: int) -> Generator:
    """Return the model on its devices."""
    attention = trained.config.attention
    if args.strategy is not None:
        if args.strategy not in STRATEGIES:
            raise ConfigError(f"strategy={shown(args.strategy)}: is not known; choose one of {', '.join(EXACT)}")
        same = args.strategy == attention.strategy
        options = {} if same else dict.fromkeys(STRATEGY_OPTIONS, 0) | {"duplex": False, "unroll": False}
        attention = dataclasses.replace(attention, strategy=args.strategy, **options)
    with as_mistakes(ValueError):
        mesh = open_mesh(args)
        sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        settings = dict(attention=attention, sampling=sampling, vocab_size=tokenizer.vocab_size, chunk=args.chunk)
        return Generator.of(trained, mesh=mesh, capacity=capacity, **settings)


def open_mesh(args: argparse.Namespace) -> Mesh:
    """Return a mesh of as many devices as were asked for, simulated ones where there are no accelerators."""
    dp, sp, tp = args.dp, 1 if args.sp is None else args.sp, args.tp
    MeshConfig(dp=dp, sp=sp, tp=tp)  # which checks them
    simulate_devices(max(1, dp * sp * tp))
    if args.sp is None and jax.default_backend() != "cpu":
        sp = -1
    wanted = None if -1 in (dp, sp, tp) else dp * sp * tp
    return make_mesh(dp=dp, sp=sp, tp=tp, devices=jax.devices()[:wanted])


def continue_prompts(
    writer: Generator,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    args: argparse.Namespace,
    ends: list[int],
    seed: int,
) -> None:
    """Print the continuation of a prompt as it comes, those of several when all have ended; then the figures."""
    stops = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in args.stop]
    show_special = args.show_special_tokens
    streams = [TextStream(tokenizer, prompt.tokens, stops, show_special=show_special) for prompt in prompts]
    settings = dict(max_new_tokens=args.max_new_tokens, stop=ends, seeds=seed)
    with as_mistakes(ValueError):
        steps = writer.generate([prompt.tokens for prompt in prompts], **settings)
    many = is_file_of_many(args)
    texts, count = [""] * len(prompts), 0
    say("Compiling ...")
    writer.compile([prompt.tokens for prompt in prompts])
    times = [time.perf_counter()]
    try:
        for step in steps:
            times.append(time.perf_counter())
            for row, (stream, token) in enumerate(zip(streams, step, strict=True)):
                if token is not None and not stream.ended:
                    count += 1
                    piece = stream.feed(token)
                    texts[row] += piece
                    if not many:
                        show(piece)
            if all(stream.ended for stream in streams):
                break
    finally:  # of Ctrl-C too: what has come is not lost
        for prompt, text, stream in zip(prompts, texts, streams, strict=True):
            show(f"--- {prompt.name}\n{text}{stream.finish()}\n" if many else f"{stream.finish()}\n")
        say(figures(writer, prompts, times, count))


def figures(writer: Generator, prompts: list[Prompt], times: list[float], count: int) -> str:
    """Return how long it took, and what the cache holds; `times` are those of the start and of each token."""
    lengths = [prompt.tokens.size for prompt in prompts]
    of = (
        f"{lengths[0]:,} tokens"
        if len(prompts) == 1
        else f"{len(prompts)} prompts of {min(lengths):,} to {max(lengths):,} tokens"
    )
    parts = [f"{of}", f"cache {writer.cache_bytes(len(prompts)) / 2**20:.1f} MiB on each device"]
    if len(times) > 1:
        parts.insert(1, f"read in {times[1] - times[0]:.2f} s")
    if len(times) > 2:
        rate = (count - len(prompts)) / (times[-1] - times[1])
        parts.insert(2, f"{count:,} new ones, {rate:.1f} tokens/s")
    return f"[{'; '.join(parts)}]"


def show(text: str) -> None:
    """Print text as it is; to a terminal without what would steer it."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)
