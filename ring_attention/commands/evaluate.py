"""Measure whether a trained model uses its context.

  python scripts/evaluate.py needle --checkpoint=runs/retrieval --lengths=1024,2048,4096,8192
  python scripts/evaluate.py needle --checkpoint=runs/retrieval --config.attention.window=1024
  python scripts/evaluate.py needle --checkpoint=Llama-3.2-1B --key=digits --needles=4 --config.mesh.sp=4
  python scripts/evaluate.py heat-maps runs/evaluation/whole/needle.json runs/evaluation/cut/needle.json --out=both.png
  python scripts/evaluate.py perplexity --checkpoint=runs/long --windows=1024,4096 --paths='books/*.txt'

needle hides keys in filler, asks for them at the end, and draws the share of right answers by length and depth.
perplexity measures the loss by position in the document, as the model is and cut to windows. The model is as it was
trained but for --config.FIELD=VALUE, for FIELDs of mesh, attention and model.rope. Numbers go to the terminal and as
JSON, with a picture, to --out. docs/retrieval.md says how it works.
"""

import argparse
import dataclasses
import sys

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ring_attention.checks import ConfigError, local_path, printable, shown
from ring_attention.commands.arguments import Parser
from ring_attention.data.sources import open_documents
from ring_attention.evaluation.model_source import (
    ModelSource,
    open_model,
    output_folder,
    require_positive,
    write_results,
)
from ring_attention.evaluation.needle_accuracy import AnswerScorer, NeedleTest, measure_needles
from ring_attention.evaluation.needle_report import HeatMap, accuracy_table, draw_heat_maps, read_heat_map
from ring_attention.evaluation.needles import NAMES, STYLES
from ring_attention.evaluation.position_loss import LossReader, bin_edges, long_documents, measure_position_loss
from ring_attention.evaluation.position_report import AS_IT_IS, draw_position_loss, position_table, position_values
from ring_attention.evaluation.questions import make_questions
from ring_attention.tables import show
from ring_attention.training.batches import Corpus


def main(argv: list[str]) -> None:
    """Read the flags, measure, show."""
    args, overrides = parse(argv)
    if args.command == "heat-maps":
        heat_maps(args)
        return
    require_positive(**({} if args.batch_size is None else {"batch_size": args.batch_size}))
    {"needle": needle, "perplexity": perplexity}[args.command](args, overrides)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the flags, and the words that are left: overrides of the config."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_needle(commands)
    add_perplexity(commands)
    help_ = "draw what `needle` measured side by side"
    command = commands.add_parser("heat-maps", help=help_, description=help_, allow_abbrev=False)
    command.add_argument("files", nargs="+", type=local_path, help="needle.json of each")
    command.add_argument("--titles", nargs="+", help="one for each; by default what was measured")
    command.add_argument("--out", type=local_path, required=True, help="PNG to write")
    args, rest = parser.parse_known_args(argv)
    if args.command == "heat-maps" and rest:
        raise ConfigError(f"{printable(rest[0])}: there is no such flag; see evaluate.py heat-maps --help")
    return args, rest


def add_common(command: argparse.ArgumentParser) -> None:
    """Flags of all commands."""
    command.add_argument("--checkpoint", required=True, help="folder of a run, an import or a Hugging Face model")
    command.add_argument("--out", help="folder for the results; by default one below runs/evaluation")
    command.add_argument("--batch_size", type=int, help="texts that are read at once; by default 32,768 tokens' worth")


def add_needle(commands) -> None:
    """Add the flags of `needle`."""
    help_ = "ask for keys that are hidden in filler, by length and depth"
    command = commands.add_parser("needle", help=help_, description=help_, allow_abbrev=False)
    add_common(command)
    command.add_argument("--lengths", default="1024,2048,4096,8192", help="tokens of a text, separated by commas")
    command.add_argument("--depths", type=int, default=11, help="how many, evenly from the beginning to the end")
    command.add_argument("--samples", type=int, default=16, help="texts of each length and depth")
    command.add_argument("--needles", type=int, default=1, help="in each text; with several, each has a name")
    command.add_argument("--key", default="letters", help=f"how texts are worded: {' or '.join(STYLES)}")
    command.add_argument("--seed", type=int, default=0, help="of the texts")


def add_perplexity(commands) -> None:
    """Add the flags of `perplexity`."""
    help_ = "loss by position in the document, as the model is and cut to windows"
    command = commands.add_parser("perplexity", help=help_, description=help_, allow_abbrev=False)
    add_common(command)
    command.add_argument("--windows", default="1024", help="tokens that are seen, separated by commas; none if empty")
    command.add_argument("--length", type=int, help="tokens of a document that are read; by default as in training")
    command.add_argument("--documents", type=int, default=32, help="the most that are read")
    command.add_argument("--paths", help="globs of documents; by default those that the run held out")


def needle(args: argparse.Namespace, overrides: list[str]) -> None:
    """Pass-key retrieval over depth and length."""
    test = needle_test(args)
    model = open_model(args.checkpoint, overrides)
    test = dataclasses.replace(test, start=model.start)
    per_length = len(test.depths) * test.samples * test.needles
    rows = {length: model.rows(length, per_length, args.batch_size or 0) for length in test.lengths}
    for length in test.lengths:
        model.check(length, rows[length])
        settings = dict(length=length, depth=0.5, needles=test.needles, start=test.start)
        make_questions(test.style, model.tokenizer, rng=np.random.default_rng(0), **settings)
    out = output_folder(args.checkpoint, args.out)
    note_beyond(model, max(test.lengths))
    scorer = AnswerScorer(model.config, model.load(), mesh=model.mesh, vocab_size=model.tokenizer.vocab_size)
    with progress_bar() as bar:
        task = bar.add_task("questions", total=per_length * len(test.lengths))
        scores = measure_needles(
            test, model.tokenizer, scorer.right, rows_of=rows.get, advance=lambda done: bar.advance(task, done)
        )
    title = f"{words_of(args, model)}\nright answers of {scores.count}"
    heat_map = HeatMap(title, test.lengths, test.depths, scores.answers)
    console = Console(soft_wrap=True, highlight=False)
    show(accuracy_table(heat_map), console)
    draw_heat_maps(out / "needle.png", [heat_map])
    results = dict(
        kind="needle", key=args.key, needles=test.needles, samples=test.samples, seed=test.seed, count=scores.count
    )
    results |= dict(title=title, lengths=test.lengths, depths=test.depths)
    results |= dict(accuracy=scores.answers.tolist(), token_accuracy=scores.tokens.tolist())
    write_results(out / "needle.json", model, results)
    console.print(f"Written: {out / 'needle.png'}, {out / 'needle.json'}")


def needle_test(args: argparse.Namespace) -> NeedleTest:
    """Return the test that the flags ask for."""
    if args.key not in STYLES:
        raise ConfigError(f"key={shown(args.key)}: is not known; choose one of {', '.join(STYLES)}")
    if not 0 < args.needles <= len(NAMES):
        raise ConfigError(f"needles={args.needles}: must be 1 to {len(NAMES)}, which have names; give fewer")
    if args.depths < 2:
        raise ConfigError(f"depths={args.depths}: must be at least 2, beginning and end; give 2 or more")
    if args.seed < 0:
        raise ConfigError(f"seed={args.seed}: must not be negative; choose another")
    require_positive(samples=args.samples)
    return NeedleTest(
        style=STYLES[args.key],
        lengths=whole_numbers("lengths", args.lengths),
        depths=tuple(np.linspace(0, 1, args.depths).tolist()),
        samples=args.samples,
        needles=args.needles,
        seed=args.seed,
    )


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """Positive whole numbers that commas separate, each once, ascending."""
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] <= 0:
        raise ConfigError(f"{name}={shown(text)}: must be positive whole numbers; write --{name}=1024,4096")
    return tuple(numbers)


def perplexity(args: argparse.Namespace, overrides: list[str]) -> None:
    """Loss by position in the document."""
    windows = whole_numbers("windows", args.windows) if args.windows else ()
    require_positive(documents=args.documents, **({} if args.length is None else {"length": args.length}))
    model = open_model(args.checkpoint, overrides)
    length = args.length or model.config.seq_len
    for window in windows:
        if window >= length:
            raise ConfigError(
                f"windows={window}: shows all of length={length}; use a smaller one, or a longer --length"
            )
    attentions = {as_it_is(model): model.config.attention}
    attentions |= {f"window {w:,}": dataclasses.replace(model.config.attention, window=w) for w in windows}
    documents = read_documents(args, model, length)
    rows = model.rows(length, len(documents), args.batch_size or 0)
    for attention in attentions.values():
        model.check(length, rows, attention)
    out = output_folder(args.checkpoint, args.out)
    note_beyond(model, length)
    params, losses = model.load(), {}
    with progress_bar() as bar:
        task = bar.add_task("documents", total=len(documents) * len(attentions))
        for name, attention in attentions.items():
            reader = LossReader(model.config, attention, params, model.mesh)
            settings = dict(rows=rows, advance=lambda done: bar.advance(task, done))
            losses[name] = measure_position_loss(reader.losses, documents, model.tokenizer, **settings)
    title, edges = f"{words_of(args, model)}\n{len(documents)} documents of {length:,} tokens", bin_edges(length)
    console = Console(soft_wrap=True, highlight=False)
    show(position_table(title, edges, losses), console)
    draw_position_loss(out / "perplexity.png", title, edges, losses)
    results = dict(kind="perplexity", length=length, windows=windows, paths=args.paths or "held out")
    write_results(out / "perplexity.json", model, results | position_values(edges, losses))
    console.print(f"Written: {out / 'perplexity.png'}, {out / 'perplexity.json'}")


def heat_maps(args: argparse.Namespace) -> None:
    """Draw what was measured before, side by side."""
    panels = [read_heat_map(path) for path in args.files]
    titles = args.titles or [panel.title for panel in panels]
    if len(titles) != len(panels):
        raise ConfigError(f"titles: got {len(titles)} for {len(panels)} files; give one for each")
    panels = [panel._replace(title=title) for panel, title in zip(panels, titles, strict=True)]
    try:
        draw_heat_maps(args.out, panels)
    except (OSError, ValueError) as error:  # matplotlib's, of a format that it does not know
        raise ConfigError(f"out={shown(str(args.out))}: cannot be written ({error}); name a .png file") from error
    print(f"Written: {args.out}")


def as_it_is(model: ModelSource) -> str:
    """Return what the model is called without another window."""
    window = model.config.attention.window
    return f"{AS_IT_IS} (window {window:,})" if window else AS_IT_IS


def read_documents(args: argparse.Namespace, model: ModelSource, length: int) -> np.ndarray:
    """int32 [documents, length+1]."""
    data = model.config.data
    if args.paths is None:
        source = Corpus.open(data).held_out
    else:
        source = open_documents(dataclasses.replace(data, paths=args.paths))
    return long_documents(source, model.tokenizer, length=length, most=args.documents, start=model.start)


def words_of(args: argparse.Namespace, model: ModelSource) -> str:
    """Return what was measured, in words."""
    config, parts = model.config, []
    if config.attention.window:
        parts.append(f"window {config.attention.window:,}")
    if config.model.rope.scaling != "none":
        parts.append(f"rope {config.model.rope.scaling} x{config.model.rope.factor:g}")
    parts.append(f"trained at {model.trained.config.seq_len:,}")
    return f"{args.checkpoint}: {', '.join(parts)}"


def note_beyond(model: ModelSource, length: int) -> None:
    """Say that texts are longer than those of training, if they are."""
    trained = model.trained.config
    if length > trained.seq_len:
        say(f"Note: up to {length:,} tokens, but the model was trained on sequences of {trained.seq_len:,}.")


def progress_bar() -> Progress:
    """On stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def say(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)
