"""The pictures of a plan: memory by part, a layer's hops beside its wires, and which strategy wins where."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from ring_attention.hardware.chips import GiB
from ring_attention.parallel.ring import Ring
from ring_attention.planning.attention_times import Seconds, add_up
from ring_attention.planning.plan import Plan
from ring_attention.planning.step_times import priced_steps
from ring_attention.planning.strategy_map import StrategyMap

PART_COLORS = {
    "parameters": "#08306b",
    "optimizer": "#2171b5",
    "gradients": "#6baed6",
    "activations": "#238b45",
    "layer": "#74c476",
    "keys and values": "#d94801",
    "vocabulary": "#fdae6b",
    "loss": "#9e9ac8",
}
MAP_COLORS = ("#9e9ac8", "#d94801", "#2171b5", "#238b45", "#08306b", "#fdae6b", "#74c476")
COMPUTE, WIRE, GRADIENTS = "#1f6fb4", "#9aa3ad", "#d97706"
SHOWN = 4
"""Hops drawn at each end of a pass; the rest are alike."""


def draw_all(plan: Plan, found: StrategyMap, folder: Path, measured: int | None = None) -> None:
    """Write memory.png, timeline.png and map.png."""
    draw_memory(plan, folder / "memory.png", measured)
    draw_timeline(plan, folder / "timeline.png")
    draw_map(found, plan, folder / "map.png")


def draw_memory(plan: Plan, path: Path, measured: int | None = None) -> None:
    """Draw a stacked bar for each strategy, beside the chip's memory and, if given, what the compiler measured."""
    figure, axes = _figure(8, 0.42 * len(plan.candidates) + 2.2)
    chip = plan.share.topology.chip
    for row, candidate in enumerate(plan.candidates):
        left = 0.0
        for name, size in candidate.memory.parts.items():
            axes.barh(row, size / GiB, left=left, color=PART_COLORS[name], height=0.66)
            left += size / GiB
        own = candidate.label == plan.own.label
        if own and measured:
            axes.plot([measured / GiB] * 2, [row - 0.42, row + 0.42], color="black", linewidth=2.5)
    axes.set_yticks(range(len(plan.candidates)), [candidate.label for candidate in plan.candidates])
    axes.invert_yaxis()
    axes.axvline(chip.memory / GiB, color="#b2182b", linestyle="--")
    axes.set(
        xlabel="GiB on a device", title=f"{plan.share.config.name} on {plan.share.topology.name}: memory, predicted"
    )
    handles = [Patch(color=PART_COLORS[name], label=name) for name in plan.memory.parts]
    handles.append(axes.plot([], [], color="#b2182b", linestyle="--", label=f"{chip.name}'s memory")[0])
    if measured:
        handles.append(axes.plot([], [], color="black", linewidth=2.5, label="compiler")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path)


def draw_timeline(plan: Plan, path: Path) -> None:
    """Draw a layer's ring on one device, forward and backward: what it computes above, what its link carries below.

    Each kind of layer has a ring of its own, as far as it reaches.
    """
    groups, ring = plan.share.groups, Ring(duplex=plan.share.config.attention.duplex)
    figure, rows = _figure(11, 4.6 * len(groups), rows=2 * len(groups))
    passes = [(group, backward) for group in groups for backward in (False, True)]
    for axes, (group, backward) in zip(rows, passes, strict=True):
        steps = priced_steps(plan.share, ring, backward, group.kind)
        shown = steps if len(steps) <= 2 * SHOWN else [*steps[:SHOWN], None, *steps[-SHOWN:]]
        _draw_steps(axes, shown, len(steps) - 2 * SHOWN)
        waiting = add_up(steps).exposed / add_up(steps).total
        of_kind = f"{group.layers} layers, {group.name}, " * (len(groups) > 1)
        axes.set_title(
            f"{of_kind}{'backward' if backward else 'forward'}: {waiting:.0%} waiting for the link",
            loc="left",
        )
        axes.set_yticks([1, 0], ["device", "link"])
        axes.set_ylim(-0.6, 1.6)
        axes.xaxis.set_major_formatter(EngFormatter("s"))
    share = plan.share
    figure.suptitle(
        f"{share.config.name} on {share.topology.name}: a layer's ring of {share.ring}, {share.tokens:,} tokens "
        "a device, predicted"
    )
    handles = [Patch(color=COMPUTE, label="computing a hop"), Patch(color=WIRE, label="keys and values")]
    handles.append(Patch(color=GRADIENTS, label="and their gradients"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def _draw_steps(axes: Axes, steps: list[Seconds | None], left_out: int) -> None:
    start = 0.0
    for step in steps:
        if step is None:
            gap = max(s.total for s in steps if s)
            axes.text(start + gap / 2, 0.5, f"{left_out} more\nhops", ha="center", va="center", fontsize=9)
            start += gap
            continue
        edge = dict(height=0.7, edgecolor="white", linewidth=0.8)
        axes.barh(1, step.compute, left=start, color=COMPUTE, **edge)
        axes.barh(0, step.keys, left=start, color=WIRE, **edge)
        axes.barh(0, step.gradients, left=start + step.keys, color=GRADIENTS, **edge)
        start += step.total


def draw_map(found: StrategyMap, plan: Plan, path: Path) -> None:
    """Draw which family of strategies takes the shortest step, by tokens per device and by the link's bandwidth."""
    figure, axes = _figure(8, 5.4)
    colors = ListedColormap(MAP_COLORS[: len(found.families)])
    axes.pcolormesh(
        found.tokens, found.bandwidths, found.best, cmap=colors, vmin=-0.5, vmax=len(found.families) - 0.5, alpha=0.75
    )
    share = plan.share
    axes.plot(share.tokens, share.topology.chip.link, "*", color="black", markersize=15)
    axes.annotate(
        "this config", (share.tokens, share.topology.chip.link), xytext=(8, 8), textcoords="offset points", fontsize=10
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks := [2**n for n in range(9, 30) if found.tokens[0] <= 2**n <= found.tokens[-1]])
    axes.set_xticklabels([f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])
    axes.yaxis.set_major_formatter(EngFormatter("B/s"))
    axes.set(
        xlabel="tokens of a device",
        ylabel="bandwidth of a link, one way",
        title=f"Fastest attention that fits, {share.ring} x {share.topology.chip.name}, predicted",
    )
    used = np.unique(found.best)
    handles = [Patch(color=MAP_COLORS[i], alpha=0.75, label=name) for i, name in enumerate(found.families) if i in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _figure(width: float, height: float, rows: int = 1):
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing outside this figure changes
    return figure, figure.subplots(rows)
