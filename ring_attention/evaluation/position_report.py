"""Loss by position as a table on the terminal and as a plot."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.table import Table

from ring_attention.evaluation.position_loss import PositionLoss

AS_IT_IS = "as it is"
COLOURS = ("#333333", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e")


def position_table(title: str, edges: np.ndarray, losses: Mapping[str, PositionLoss]) -> Table:
    """Return a table of nats per token and bits per byte, and what each other one costs beyond the first."""
    first, *others = losses.values()
    table = Table("positions", "nats/token", "bits/byte", *list(losses)[1:], title=title)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    columns = [_plus_minus(first.mean(), first.error()), [f"{bits:.3f}" for bits in first.bits_per_byte()]]
    columns += [_plus_minus(*other.more_than(first), sign="+") for other in others]
    for row, cells in enumerate(zip(*columns, strict=True)):
        table.add_row(f"{edges[row]:,} to {edges[row + 1] - 1:,}", *cells)
    return table


def draw_position_loss(path: Path, title: str, edges: np.ndarray, losses: Mapping[str, PositionLoss]) -> None:
    """Draw nats per token over the position into a PNG; bars are standard errors, dotted lines the bins' edges."""
    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing outside this figure changes
    axes = figure.add_subplot(xscale="log", xlabel="position in the document (tokens)", ylabel="nats per token")
    centres = np.sqrt(np.maximum(edges[:-1], edges[1] / 4) * edges[1:])
    for number, (name, loss) in enumerate(losses.items()):
        style = dict(color=COLOURS[number % len(COLOURS)], marker="o", markersize=4, capsize=3, linewidth=1.6)
        axes.errorbar(centres, loss.mean(), np.nan_to_num(loss.error()), label=name, **style)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(edges[1:], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda edge, _: f"{edge:,.0f}"))
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", linestyle=":", alpha=0.6)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def position_values(edges: np.ndarray, losses: Mapping[str, PositionLoss]) -> dict:
    """All numbers, fit for JSON; a standard error is null for a single document."""
    first = next(iter(losses.values()))
    values = {}
    for name, loss in losses.items():
        more, more_error = loss.more_than(first)
        values[name] = {
            "nats_per_token": loss.mean().tolist(),
            "standard_error": _known(loss.error()),
            "bits_per_byte": loss.bits_per_byte().tolist(),
            "more_nats_per_token": more.tolist(),
            "more_standard_error": _known(more_error),
        }
    return {"edges": edges.tolist(), "documents": len(first.nats), "losses": values}


def _plus_minus(means: np.ndarray, errors: np.ndarray, sign: str = "") -> list[str]:
    return [
        f"{mean:{sign}.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}")
        for mean, error in zip(means, errors, strict=True)
    ]


def _known(errors: np.ndarray) -> list[float | None]:
    return [None if np.isnan(error) else float(error) for error in errors]
