"""Draws docs/ring.png: key/value blocks travelling around a ring of four devices, and the work that each hop brings.

python -m scripts.figures ring docs/ring.png
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import ring_attention as ra
from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser

WIDTH, HEIGHT, DPI = 9.0, 5.0, 200  # inches: 1800 x 1000 pixels, meant to be shown at 900
RING_SIZE = 4
SHARD_TOKENS = 8  # of a device, in the little pictures of work
COLORS = ["#2f74d0", "#e07b2c", "#2f9e63", "#8f56bf"]  # of the four key/value blocks
INK, QUIET = "#20242a", "#5f666e"
DARK, LIGHT = 0.85, 0.18  # strength of a colour where a query sees a key, and where it does not


def pale(color: str, strength: float) -> np.ndarray:
    """`color` mixed with white."""
    return strength * np.array(to_rgb(color)) + 1 - strength


def box(axes: Axes, x: float, y: float, width: float, height: float, **style) -> None:
    """A rounded box around the point (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.07", **style))


def text(axes: Axes, x: float, y: float, words: str, **style) -> None:
    """Words whose middle is at the height y."""
    axes.text(x, y, words, **(dict(size=9.5, color=INK, va="center") | style))


def block(axes: Axes, x: float, y: float, index: int, scale: float = 1.0) -> None:
    """Draw the keys and values of one shard."""
    box(axes, x, y, 0.62 * scale, 0.28 * scale, facecolor=COLORS[index], edgecolor="white", linewidth=1.2, zorder=4)
    text(
        axes, x, y - 0.008, f"K{index} V{index}", color="white", size=9.5 * scale, weight="bold", ha="center", zorder=5
    )


def device(axes: Axes, x: float, y: float, index: int) -> None:
    """A device with the queries it keeps and the block it starts with."""
    box(axes, x, y, 1.02, 1.0, facecolor="white", edgecolor=INK, linewidth=1.3, zorder=3)
    text(axes, x, y + 0.335, f"device {index}", ha="center", zorder=5)
    box(axes, x, y + 0.055, 0.62, 0.28, facecolor="white", edgecolor=INK, linewidth=1.2, zorder=4)
    text(axes, x, y + 0.047, f"Q{index}", weight="bold", ha="center", zorder=5)
    block(axes, x, y - 0.29, index)


def arc(axes: Axes, x: float, y: float, radius: float, start: float, end: float, color: str) -> None:
    """An arrow along a circle, clockwise from the angle `start` to `end`."""
    angles = np.linspace(start, end, 60)
    xs, ys = x + radius * np.cos(angles), y + radius * np.sin(angles)
    axes.plot(xs[:-4], ys[:-4], color=color, linewidth=2.6, solid_capstyle="round", zorder=1)
    head = FancyArrowPatch((xs[-6], ys[-6]), (xs[-1], ys[-1]), arrowstyle="-|>,head_length=8,head_width=4.5")
    head.set(color=color, linewidth=0, zorder=2)
    axes.add_patch(head)


def ring(axes: Axes, x: float, y: float, radius: float) -> None:
    """Draw the devices in a circle, device 0 on top, each passing its block to the next."""
    step = 2 * np.pi / RING_SIZE
    margin = 0.44  # radians that half a device takes
    for i in range(RING_SIZE):
        angle = np.pi / 2 - step * i
        arc(axes, x, y, radius, angle - margin, angle - step + margin, COLORS[i])
        device(axes, x + radius * np.cos(angle), y + radius * np.sin(angle), i)
    for line, words in enumerate(("one hop:", "attend to the block", "at hand, while it", "moves on")):
        text(axes, x, y + 0.3 - 0.2 * line, words, ha="center", weight="normal" if line else "bold")


def work(axes: Axes, x: float, y: float, size: float, visitor: int, sees: np.ndarray) -> None:
    """One cell of the schedule: which of its queries (rows) see which of the visiting keys (columns)."""
    image = np.where(sees[..., None], pale(COLORS[visitor], DARK), pale(COLORS[visitor], LIGHT))
    axes.imshow(image, extent=(x, x + size, y, y + size), interpolation="nearest", zorder=2, aspect="auto")
    axes.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor="white", linewidth=1, zorder=3))


def schedule(axes: Axes, left: float, top: float, size: float, gap: float) -> None:
    """Devices down, hops across: the block that each device holds at each hop."""
    positions = ra.SequenceLayout("zigzag", RING_SIZE).positions(RING_SIZE * SHARD_TOKENS).reshape(RING_SIZE, -1)
    pitch = size + gap
    for hop in range(RING_SIZE):
        text(axes, left + hop * pitch + size / 2, top + 0.16, f"hop {hop}", ha="center")
    for i in range(RING_SIZE):
        y = top - i * pitch - size
        text(axes, left - 0.12, y + size / 2 + 0.1, f"device {i}", ha="right")
        text(axes, left - 0.12, y + size / 2 - 0.1, f"Q{i} meets", ha="right", color=QUIET)
        for hop in range(RING_SIZE):
            x, visitor = left + hop * pitch, (i - hop) % RING_SIZE
            work(axes, x, y, size, visitor, sees=positions[i][:, None] >= positions[visitor][None, :])
            block(axes, x + size / 2, y + size / 2, visitor, scale=0.88)


def legend(axes: Axes, x: float, y: float) -> None:
    """Draw the legend of dark and light."""
    for offset, strength, words in ((0.0, DARK, "query sees key: computed"), (2.25, LIGHT, "later key: skipped")):
        axes.add_patch(Rectangle((x + offset, y - 0.08), 0.2, 0.16, facecolor=pale(QUIET, strength)))
        text(axes, x + offset + 0.28, y, words)


def headline(axes: Axes, x: float, words: str, explanation: str) -> None:
    """A title over one half of the picture, and a sentence below it."""
    text(axes, x, HEIGHT - 0.3, words, size=13, weight="bold")
    text(axes, x, HEIGHT - 0.58, explanation, size=10, color=QUIET)


def draw(path: Path) -> None:
    """Draw the whole picture."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    headline(axes, 0.3, "Queries stay, blocks travel", "Four devices, each with Q, K, V of its tokens.")
    ring(axes, x=2.1, y=2.3, radius=1.34)
    headline(
        axes,
        4.45,
        "In four hops every query meets every key",
        "Tokens dealt in zigzag order: all hops take equally long.",
    )
    schedule(axes, left=5.4, top=3.92, size=0.76, gap=0.1)
    legend(axes, 5.0, 0.28)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Draw into the file that the command line names."""
    parser = Parser(description=__doc__)
    parser.add_argument("png", type=local_path, help="where the picture goes")
    draw(parser.parse_args(argv).png)
