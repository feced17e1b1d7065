"""The picture of a run: its losses over its steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ring_attention.checks import require
from ring_attention.training.metrics import read_metrics

WIDTH_PX, HEIGHT_PX, DPI = 900, 550, 100

_TRAINING, _HELDOUT, _REFERENCE = "#1f77b4", "#d62728", "#555555"
_LABEL_GAP = 0.05  # of the axes' height: a line of 9-point text takes 0.04


def plot_losses(
    metrics_path: Path,
    png_path: Path,
    *,
    references: Mapping[str, float] | None = None,
    ylabel: str = "loss (nats per token)",
    title: str = "",
    training: str = "loss",
    heldout: str = "heldout_loss",
) -> None:
    """Draw the losses of a run into a PNG of 900 x 550 pixels.

    The training loss is drawn raw in a light colour and, over it, as a running mean of a fiftieth of its points.
    Held-out losses are dots, references dashed lines with their names and values beside the axes. The vertical axis
    leaves out the largest 2% of the training losses: the steep first steps.

    Args:
      metrics_path: what `MetricsWriter` wrote; a line without one of the two losses is fine.
      png_path: where the picture goes.
      references: losses to compare with, by name.
      ylabel: what the losses are and their unit.
      title: over the picture.
      training, heldout: the names that the two losses have in the metrics.

    Raises:
      ValueError: if the metrics hold neither loss.
    """
    metrics = read_metrics(metrics_path)
    steps, losses = _series(metrics, training)
    heldout_steps, heldout_losses = _series(metrics, heldout)
    references = references or {}
    last_step = max([*steps, *heldout_steps], default=0)
    require(last_step > 0, f"{metrics_path} holds no {training!r} and no {heldout!r} after step 0; plot it later")

    figure = Figure(figsize=(WIDTH_PX / DPI, HEIGHT_PX / DPI), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing outside this figure changes
    axes = figure.add_subplot(xlabel="step", ylabel=ylabel, title=title)
    axes.plot(steps, losses, color=_TRAINING, alpha=0.3, linewidth=0.8)
    axes.plot(steps, _running_mean(losses), color=_TRAINING, linewidth=1.8, label="training")
    axes.plot(heldout_steps, heldout_losses, "o", color=_HELDOUT, markersize=4.5, label="held out")
    for value in references.values():
        axes.axhline(value, color=_REFERENCE, linestyle=(0, (5, 4)), linewidth=1)
    _limit(axes, losses, [*heldout_losses[-1:], *references.values()])
    labels = [(value, name, _REFERENCE) for name, value in references.items()]
    if len(heldout_losses):
        labels.append((heldout_losses[-1], "held out, last", _HELDOUT))
    _label(axes, labels)
    axes.set_xlim(0, 1.01 * last_step)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", edgecolor="none", framealpha=0.9)
    figure.savefig(png_path)


def _series(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of the lines that hold a finite `name`."""
    points = [(line["step"], line[name]) for line in metrics if np.isfinite(line.get(name, np.nan))]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of a fiftieth of the points around each, of fewer towards the ends."""
    reach = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    width = np.minimum(reach, np.minimum(index, index[::-1]))  # symmetric, so that a falling curve is not biased
    return (sums[index + width + 1] - sums[index - width]) / (2 * width + 1)


def _limit(axes: Axes, losses: np.ndarray, others: Sequence[float]) -> None:
    """Set the vertical limits so that `others` and all but the largest 2% of `losses` are well inside."""
    values = [*others, *(np.quantile(losses, [0.0, 0.98]) if len(losses) else [])]
    if values:
        pad = 0.06 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - pad, max(values) + pad)


def _label(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, name, colour) beside the axes, moved apart where they would overlap, each tied to its value."""
    labels = sorted(labels)
    low, high = axes.get_ylim()
    heights = [(value - low) / (high - low) for value, _, _ in labels]
    for (value, name, colour), height, place in zip(labels, heights, _spread(heights, _LABEL_GAP), strict=True):
        axes.annotate(
            f"{name}  {value:.3f}",
            xy=(1, height),
            xytext=(1.035, place),
            xycoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], gap: float) -> np.ndarray:
    """Return ascending `heights` moved as little as needed to be `gap` apart."""
    # With the gaps taken out the order must not fall: groups that would cross share their mean (isotonic regression).
    groups: list[tuple[float, int]] = []
    for index, height in enumerate(heights):
        mean, size = height - index * gap, 1
        while groups and groups[-1][0] > mean:
            before, before_size = groups.pop()
            mean, size = (before * before_size + mean * size) / (before_size + size), before_size + size
        groups.append((mean, size))
    level = [mean for mean, size in groups for _ in range(size)]
    return np.array(level) + gap * np.arange(len(level))
