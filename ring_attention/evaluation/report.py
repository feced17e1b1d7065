"""What a person reads when a run is done: its score beside honest references, and where to go from here."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from ring_attention.data.sources import DocumentSource
from ring_attention.evaluation.byte_models import MAX_ORDER, ByteModel
from ring_attention.evaluation.loss_plot import plot_losses
from ring_attention.tables import show
from ring_attention.training.batches import Corpus, HeldOut
from ring_attention.training.config import TrainConfig
from ring_attention.training.fault_tolerance.disk import require_there
from ring_attention.training.flags import CONFIGS, PACKAGED_CONFIGS
from ring_attention.training.run import Result, Run

FITTED_BYTES = 256 * 2**20
"""Size of the text that the byte models are fitted on, at most: a large corpus is not read to its end for them."""


def byte_references(corpus: Corpus, held_out: HeldOut) -> dict[str, float]:
    """Bits per byte, on the same held-out bytes, of byte models fitted on the training split's first FITTED_BYTES."""
    model = ByteModel.fit(_first_texts(corpus.train, FITTED_BYTES))
    return {
        f"byte model, order {order}": model.bits_per_byte(held_out.segments, order=order)
        for order in range(MAX_ORDER + 1)
    }


def _first_texts(documents: DocumentSource, num_bytes: int) -> Iterator[bytes]:
    """Yield the texts of documents until they are `num_bytes` together."""
    read = 0
    for index in range(len(documents)):
        if read >= num_bytes:
            return
        text = documents[index].text
        read += len(text)
        yield text


def report(run: Run, result: Result) -> None:
    """Draw the plot of the losses and print the scores, the run folder, and what to try next.

    Of the processes of a run the first one does, the others return at once.

    Raises:
      RunError: if the metrics were removed while the run went on.
    """
    if not run.is_first:
        return
    config, folder, held_out = run.config, run.folder, run.held_out
    require_there(folder.metrics)
    references = byte_references(run.corpus, held_out)
    plot_losses(
        folder.metrics,
        folder.loss_plot,
        references=references,
        ylabel="bits per byte",
        title=f"{config.name}: {config.seq_len} tokens of context",
        training="bits_per_byte",
        heldout="heldout_bits_per_byte",
    )
    table = Table("model", "bits per byte", title=f"Held-out text, {held_out.num_bytes:,} bytes")
    table.columns[1].justify = "right"
    scores = references | {"this Transformer": result.heldout_bits_per_byte}
    if result.initial_bits_per_byte is not None:
        scores["what it began with"] = result.initial_bits_per_byte
    for name, bits in sorted(scores.items(), key=lambda item: -item[1]):
        style = "bold" if name == "this Transformer" else ""
        table.add_row(name, f"{bits:.3f}", style=style)
    console = Console(highlight=False, soft_wrap=True)
    show(table, console)
    console.print(f"Run folder: {folder.path}  (loss.png, metrics.jsonl, tensorboard/, checkpoints/, config.json)")
    again = _again(config)
    if again:
        console.print("Next, for example:")
        for line in _suggestions(config, again):
            console.print(f"  {line}")


def _again(config: TrainConfig) -> str:
    """Return the command that trains by this config, empty if no file to choose has its name."""
    if (CONFIGS / f"{config.name}.py").is_file():
        return f"python train.py --config={CONFIGS}/{config.name}.py"
    packaged = (PACKAGED_CONFIGS / f"{config.name}.py").is_file()
    return f"ring-attention train --config={config.name}" if packaged else ""


def _suggestions(config: TrainConfig, again: str) -> list[str]:
    more, twice = 4 * config.num_steps, 2 * config.seq_len
    return [
        f"{again} --config.seq_len={twice} --config.run_dir=runs/longer_context   (twice the context)",
        f"{again} --config.data.paths='my/texts/**/*.txt' --config.run_dir=runs/mine   (your own text)",
        f"{again} --config.num_steps={more} --config.run_dir=runs/longer   (four times the steps)",
    ]
