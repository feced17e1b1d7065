"""How evenly each layout shares the work of a ring, over all hops and hop by hop. Counts pairs; runs nothing.

  python -m scripts.figures balance --out docs/schedule.png
  python -m scripts.figures balance --devices 16 --seq_len 1048576 --window 131072
  python -m scripts.figures balance --documents 12
  python -m scripts.figures balance --speeds "1 1 0.5 1 1 1 1 1" --out speeds.png

A device's work is the number of pairs of a query and a key that see each other; times are work / speed.
"""

import argparse
import dataclasses

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import ring_attention as ra
from ring_attention.checks import ConfigError, require_field
from ring_attention.commands.arguments import Parser
from ring_attention.parallel.layouts import LAYOUT_KINDS, parse_speeds
from ring_attention.planning.balance import balance_of, work_by_hop
from ring_attention.tables import show

DPI = 200  # a picture of three panels is 1800 pixels wide, meant to be shown at 900
LEFT, PITCH, GRID = 0.72, 2.78, 1.9  # inches: left of the first panel, from one to the next, the side of a grid
GAP, NUMBERS, BARS = 0.07, 0.3, 0.4  # inches: what stands right of a grid
TOP, BOTTOM = 1.48, 0.72  # inches for the words above the grids, and for the colour bar below
INK, QUIET, IDLE, BAR = "#20242a", "#5f666e", "#a3a9b0", "#aab2bb"
COLORS = colormaps["Blues"]
MOST_NUMBERS = 16  # devices, beyond which numbers in cells would be too small to read
SEED = 0  # of the documents' lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One layout: a row of the table and a panel of the picture.

    Attributes:
      name: of the layout.
      work: int64 [P, P], see `work_by_hop`.
      shares: float64 [P], all work of each device over the mean.
      fair: float64 [P], what `shares` should be: 1, or in proportion to the devices' speeds.
    """

    name: str
    work: np.ndarray
    shares: np.ndarray
    fair: np.ndarray


def documents(number: int, seq_len: int) -> np.ndarray:
    """int64 [1, T], natural order: the segments of documents of random lengths, packed into one row."""
    need = f"a row of {seq_len} tokens has room for 1 to {seq_len} documents"
    require_field(0 < number <= seq_len, "documents", number, need, "choose fewer, or 0 for none")
    starts = 1 + np.random.default_rng(SEED).choice(seq_len - 1, number - 1, replace=False)
    return np.searchsorted(np.sort(starts), np.arange(seq_len), side="right")[None]


def panels_of(args: argparse.Namespace) -> list[Panel]:
    """Return the layouts to compare: all that have a name, and one dealt to `--speeds` if there are any."""
    P, T = args.devices, args.seq_len
    require_field(len(args.speeds) in (0, P), "speeds", args.speeds, f"need {P} numbers, one a device", "see --devices")
    segments = documents(args.documents, T) if args.documents else None
    try:
        layouts = [ra.SequenceLayout(kind, P) for kind in LAYOUT_KINDS]
        layouts += [ra.SequenceLayout.for_speeds(args.speeds)] if args.speeds else []
        work = [
            work_by_hop(
                layout,
                T,
                causal=not args.bidirectional,
                window=args.window or None,
                segment_ids=None if segments is None else layout.permute(segments, 1),
            )
            for layout in layouts
        ]
    except ValueError as error:  # these words say got, need and remedy too
        raise ConfigError(str(error)) from error
    fair = np.array(args.speeds) / np.mean(args.speeds) if args.speeds else np.ones(P)
    shares = [w.sum(1) / w.sum(1).mean() for w in work]
    return [
        Panel(name=layout.kind, work=w, shares=s, fair=fair) for layout, w, s in zip(layouts, work, shares, strict=True)
    ]


def mask_of(args: argparse.Namespace) -> str:
    """Return the mask in words."""
    parts = ["bidirectional" if args.bidirectional else "causal"]
    parts += [f"window of {args.window:,}"] if args.window else []
    parts += [f"{args.documents:,} packed documents"] if args.documents else []
    return ", ".join(parts)


def table_of(panels: list[Panel], args: argparse.Namespace) -> Table:
    """One row for each layout."""
    caption = "work of a device, over the mean;\nhop by hop: as if all waited for the slowest at every hop"
    if args.speeds:
        caption += ";\ntime: work / speed of the slowest device, over that of a fair share"
    table = Table(title=f"{mask_of(args)}, T={args.seq_len:,}, P={args.devices}", caption=caption)
    table.add_column("layout")
    columns = ["least busy", "most busy", "max/mean", "hop by hop"] + ["time", "time hop by hop"] * bool(args.speeds)
    for column in columns:
        table.add_column(column, justify="right")
    for panel in panels:
        numbers = [panel.shares.min(), panel.shares.max(), *balance_of(panel.work)]
        numbers += [*balance_of(panel.work, args.speeds)] if args.speeds else []
        table.add_row(panel.name, *(f"{number:.3f}" for number in numbers))
    return table


def text(figure: Figure, x: float, y: float, words: str, **style) -> None:
    """Words that begin x inches from the left, their middle y inches from the bottom."""
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, words, **(dict(size=9, color=INK, va="center") | style))


def axes_at(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes without a frame; inches from the left and the bottom."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((x / across, y / up, width / across, height / up))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=3, labelsize=8, labelcolor=INK)
    return axes


def draw_grid(axes: Axes, work: np.ndarray, full: int, named: bool) -> None:
    """Devices down, hops across; `full` pairs make the darkest cell."""
    P = len(work)
    shares = work / full
    edges = np.arange(P + 1) - 0.5
    axes.pcolormesh(edges, edges, shares, cmap=COLORS, vmin=0, vmax=1, edgecolor="white", linewidth=min(1, 16 / P))
    axes.set(xlim=(-0.5, P - 0.5), ylim=(P - 0.5, -0.5))
    axes.xaxis.tick_top()
    ticks = np.arange(0, P, -(-P // MOST_NUMBERS))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks if named else [], [f"device {tick}" for tick in ticks] if named else [])
    axes.tick_params(labelsize=min(8, 90 / len(ticks)))
    if P > MOST_NUMBERS:
        return
    for (device, hop), share in np.ndenumerate(shares):
        style = dict(
            size=min(8, 75 / P),
            color="white" if share > 0.55 else INK if share else IDLE,
            ha="center",
            va="center_baseline",
        )
        axes.text(hop, device, (device - hop) % P, **style)


def draw_bars(axes: Axes, panel: Panel, longest: float) -> None:
    """All work of each device over the mean, and a line where it should end."""
    P = len(panel.shares)
    axes.barh(range(P), panel.shares, height=0.78, color=BAR)
    axes.vlines(panel.fair, np.arange(P) - 0.5, np.arange(P) + 0.5, color=INK, linewidth=1)
    axes.set(xlim=(0, longest), ylim=(P - 0.5, -0.5), xticks=[], yticks=[])
    if P <= MOST_NUMBERS:
        for device, share in enumerate(panel.shares):
            style = dict(size=min(8, 75 / P), color=INK, ha="right", va="center_baseline")
            axes.text(-0.1 * longest, device, f"{share:.2f}", **style)


def draw_scale(figure: Figure, x: float, y: float, width: float) -> None:
    """Draw the scale, which says what the colours mean."""
    axes = axes_at(figure, x, y, width, 0.13)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=COLORS, vmin=0, vmax=1, extent=(0, 1, 0, 1), aspect="auto")
    axes.spines[:].set(visible=True, color=IDLE, linewidth=0.6)
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "all"])


def draw(panels: list[Panel], args: argparse.Namespace) -> None:
    """Draw the whole picture into the file `--out`."""
    P = args.devices
    figure = Figure(figsize=(LEFT + PITCH * len(panels) - 0.06, TOP + GRID + BOTTOM), dpi=DPI, facecolor="white")
    top = BOTTOM + GRID
    text(figure, 0.14, top + 1.24, "Who computes how much, and when", size=13, weight="bold")
    meets = "the number in a cell: whose keys a device meets at that hop"
    if P > MOST_NUMBERS:
        meets = f"at hop s, device i meets the keys of device (i - s) mod {P}"
    words = f"Mask: {mask_of(args)}; {args.seq_len:,} tokens, {P} devices; {meets}."
    text(figure, 0.14, top + 0.96, words, size=9.5, color=QUIET)
    longest = max(max(panel.shares.max(), panel.fair.max()) for panel in panels)
    for number, panel in enumerate(panels):
        x = LEFT + PITCH * number
        total, by_hop = balance_of(panel.work, args.speeds or None)
        measure = "slowest/fair" if args.speeds else "max/mean"
        text(figure, x, top + 0.62, panel.name, size=11, weight="bold")
        text(figure, x, top + 0.42, f"{measure} {total:.2f}, hop by hop {by_hop:.2f}")
        draw_grid(axes_at(figure, x, BOTTOM, GRID, GRID), panel.work, (args.seq_len // P) ** 2, named=number == 0)
        draw_bars(axes_at(figure, x + GRID + GAP + NUMBERS, BOTTOM, BARS, GRID), panel, longest)
        text(figure, x + GRID + GAP, top + 0.11, "total", size=8)
    text(figure, LEFT - 0.06, top + 0.11, "hop", size=8, ha="right")
    text(figure, LEFT, 0.415, "share of the pairs in a hop that are visible")
    draw_scale(figure, LEFT + PITCH, 0.35, GRID)
    of = "line: its share by speed" if args.speeds else "line: an even share"
    text(figure, LEFT + 2 * PITCH, 0.415, "total: of a device, over the mean")
    text(figure, LEFT + 2 * PITCH, 0.225, of, color=QUIET)
    figure.savefig(args.out)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--devices", type=int, default=8, metavar="P", help="places in the ring")
    parser.add_argument("--seq_len", type=int, default=65536, metavar="T", help="tokens")
    parser.add_argument("--window", type=int, default=0, metavar="W", help="tokens that a token sees; 0: no bound")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="packed documents; 0: all one text")
    parser.add_argument("--bidirectional", action="store_true", help="tokens see later ones too")
    parser.add_argument("--speeds", default="", metavar='"S ..."', help="of the devices: also deal tokens by them")
    parser.add_out("draw a picture into this file")
    args = parser.parse_args(argv)
    try:
        args.speeds = parse_speeds(args.speeds) if args.speeds else []
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def main(argv: list[str]) -> None:
    """Count, print, draw."""
    args = parse(argv)
    require_field(args.devices > 0, "devices", args.devices, "a ring needs at least one", "choose 1 or more")
    panels = panels_of(args)
    show(table_of(panels, args))
    if args.out:
        draw(panels, args)
