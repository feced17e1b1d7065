"""Retrieval as a table on the terminal and as heat maps, depth x length."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ring_attention.checks import ConfigError, one_line, printable

COLOURS = "RdYlBu"  # told apart by those who do not see red and green


class HeatMap(NamedTuple):
    """Shares of right answers.

    Attributes:
      title: over the picture; may have several lines.
      lengths: of the columns, in tokens.
      depths: of the rows, 0 to 1.
      accuracy: float [depths, lengths], 0 to 1.
    """

    title: str
    lengths: Sequence[int]
    depths: Sequence[float]
    accuracy: np.ndarray


def accuracy_table(heat_map: HeatMap) -> Table:
    """Percent of right answers; the last row is the mean."""
    table = Table("depth", *(f"{length:,}" for length in heat_map.lengths), title=heat_map.title)
    for column in table.columns:
        column.justify = "right"
    last = len(heat_map.depths) - 1
    for number, (depth, row) in enumerate(zip(heat_map.depths, heat_map.accuracy, strict=True)):
        table.add_row(f"{depth:.0%}", *(f"{share:.0%}" for share in row), end_section=number == last)
    table.add_row("mean", *(f"{share:.1%}" for share in heat_map.accuracy.mean(0)))
    return table


def draw_heat_maps(path: Path, heat_maps: Sequence[HeatMap]) -> None:
    """Draw heat maps side by side into a PNG; colours go from 0 to 1 in each, and every cell says its percentage."""
    columns = sum(len(heat_map.lengths) for heat_map in heat_maps)
    rows = max(len(heat_map.depths) for heat_map in heat_maps)
    size = (1.6 + 1.6 * len(heat_maps) + 0.72 * columns, 1.8 + 0.36 * rows)
    figure = Figure(figsize=(max(size[0], 5.5), size[1]), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing outside this figure changes
    widths = [1 + len(heat_map.lengths) for heat_map in heat_maps]
    panels = figure.subplots(1, len(heat_maps), squeeze=False, width_ratios=widths)[0]
    for axes, heat_map in zip(panels, heat_maps, strict=True):
        image = _draw(axes, heat_map)
    panels[0].set_ylabel("depth of the needle")
    bar = figure.colorbar(image, ax=list(panels), label="right answers", ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels([f"{share:.0%}" for share in (0, 0.25, 0.5, 0.75, 1)])
    figure.savefig(path)


def read_heat_map(path: Path) -> HeatMap:
    """Read what `evaluate needle` wrote as JSON; ConfigError if it is no such file."""
    try:
        values = json.loads(path.read_text())
        accuracy = np.array(values["accuracy"], np.float64)
        heat_map = HeatMap(str(values["title"]), values["lengths"], values["depths"], accuracy)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = one_line(error)
        raise ConfigError(
            f"{printable(str(path))}: is no needle.json of evaluate.py needle ({reason}); check it"
        ) from error
    if accuracy.shape != (len(heat_map.depths), len(heat_map.lengths)):
        raise ConfigError(f"{printable(str(path))}: accuracy has shape {accuracy.shape}; measure again")
    return heat_map


def _draw(axes: Axes, heat_map: HeatMap):
    image = axes.imshow(heat_map.accuracy, vmin=0, vmax=1, cmap=COLOURS, aspect="auto")
    axes.set_title(heat_map.title, fontsize=10)
    axes.set_xlabel("length (tokens)")
    axes.set_xticks(range(len(heat_map.lengths)), [f"{length:,}" for length in heat_map.lengths])
    axes.set_yticks(range(len(heat_map.depths)), [f"{depth:.0%}" for depth in heat_map.depths])
    for (row, column), share in np.ndenumerate(heat_map.accuracy):
        dark = share < 0.15 or share > 0.85
        style = dict(ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.text(column, row, f"{100 * share:.0f}", **style)
    return image
