"""A plan as one page of HTML that needs nothing else: memory, a layer's hops, the strategy map, the commands."""

import importlib.resources
import json
import string
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from ring_attention.hardware.chips import GiB
from ring_attention.planning.advice import Advice, seconds
from ring_attention.planning.attention_times import Seconds
from ring_attention.planning.plan import Plan
from ring_attention.planning.report import KIND_COLUMNS, hardware_rows, kind_cells
from ring_attention.planning.shares import LayerGroup
from ring_attention.planning.step_times import KindTime, priced_steps
from ring_attention.planning.strategy_map import StrategyMap

WIDTH = 960
"""Units across a picture; the page scales them to its own width."""

SHOWN = 4
"""Hops drawn at each end of a pass; the rest are alike."""


class Advised(NamedTuple):
    """A way to run the step as people read it.

    Attributes:
      title: what it is.
      words: what it takes, in a line.
      command: a line for a shell.
      good: whether it fits the pod that was planned.
    """

    title: str
    words: str
    command: str
    good: bool = True


def make_page(plan: Plan, advice: Advice | None, advised: Sequence[Advised], found: StrategyMap) -> str:
    """Return the page: one self-contained document, whatever the names in the plan are.

    Args:
      plan: of the config.
      advice: what was searched beside it, or None.
      advised: what to run, with the command for each.
      found: the strategy map of the same config.
    """
    share = plan.share
    template = (importlib.resources.files("ring_attention.planning") / "page.html").read_text(encoding="utf-8")
    data = json.dumps(_map_data(plan, found)).replace("<", "\\u003c")
    return string.Template(template).substitute(
        title=escape(f"{share.config.name} on {share.topology.name}"),
        facts=_facts(plan),
        advice="\n".join(map(_advice, advised)),
        memory=_memory(plan, advice),
        timeline=_timeline(plan),
        strategies=_strategies(plan),
        hardware=_table(("figure of a device", "source"), hardware_rows(plan)),
        data=data,
    )


def _facts(plan: Plan) -> str:
    share = plan.share
    mesh = " ".join(f"{name}={size}" for name, size in share.mesh.items() if size > 1) or "one device"
    facts = {
        "parameters": f"{share.config.transformer.num_parameters:,}",
        "tokens of context": f"{share.config.seq_len:,}",
        "tokens of a device": f"{share.tokens:,}",
        "sequences of a step": f"{share.config.batch_size:,}",
        "mesh": mesh,
        "attention kernel": share.attention.kernel.name,
        "model FLOPs of a step": f"{plan.model_flops:.3g}",
        "this config": f"{seconds(plan.own.time.total)} a step" if plan.own.fits else "does not fit",
    }
    items = (f"<li><b>{escape(value)}</b>{escape(name)}</li>" for name, value in facts.items())
    return f'<ul class="facts">{"".join(items)}</ul>'


def _advice(advised: Advised) -> str:
    words = " ".join(f"<span>{escape(word)}</span>" for word in advised.command.split(" "))
    return (
        f'<section class="card advice {"good" if advised.good else "bad"}"><h2>{escape(advised.title)}</h2>'
        f"<p>{escape(advised.words)}</p>"
        f'<div class="command"><pre><code>{words}</code></pre>'
        '<button type="button" data-copy>Copy</button></div></section>'
    )


def _memory(plan: Plan, advice: Advice | None) -> str:
    """A stacked bar for each strategy and for what is advised, with the chip's memory as a line."""
    bars = [(candidate.label, candidate) for candidate in plan.candidates]
    if advice:
        named = (("fastest that fits", advice.fastest), ("longest context", advice.longest))
        bars += [(name, candidate) for name, candidate in named if candidate]
    limit, left, right, row = plan.share.topology.chip.memory, 170, 70, 26
    most = min(max(limit, *(c.memory.total for _, c in bars)), 2.5 * limit)
    scale = (WIDTH - left - right) / most
    height = row * len(bars) + 26
    drawn, values = [_axis(left, scale, most, height)], []
    for i, (name, candidate) in enumerate(bars):
        x, y = float(left), i * row + 4
        drawn.append(f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for part, (words, size) in enumerate(candidate.memory.parts.items()):
            wide = max(min(size * scale, left + most * scale - x), 0)
            title = f"<title>{escape(words)}: {size / GiB:.2f} GiB</title>"
            drawn.append(_bar(x, y, wide, 18, f"var(--p{part})", title))
            x += wide
        beyond = "→ " if candidate.memory.total > most else ""
        size = f"{beyond}{candidate.memory.total / GiB:.1f}"
        values.append(f'<text class="value" x="{x + 6:.1f}" y="{y + 13}">{size}</text>')
    at = left + limit * scale
    drawn.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height - 22}"/>')
    legend = [(f"var(--p{i})", name) for i, name in enumerate(plan.memory.parts)]
    limit_words = f"{plan.share.topology.chip.name}: {limit / GiB:.1f} GiB"
    return _svg(height, [*drawn, *values]) + _legend([*legend, ("var(--bad)", limit_words)])


def _axis(left: int, scale: float, most: float, height: int) -> str:
    """Lines at round numbers of GiB."""
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**6) if most / GiB / n <= 9)
    drawn = []
    for gib in range(0, int(most / GiB) + 1, step):
        x = left + gib * GiB * scale
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 22}"/>')
        drawn.append(f'<text class="soft" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{gib}</text>')
    return "".join(drawn)


def _timeline(plan: Plan) -> str:
    """What a device computes, and what its link carries meanwhile, of both passes of a layer's attention, by kind."""
    several = len(plan.share.groups) > 1
    table = _table((*KIND_COLUMNS, ""), [(*cells, "") for cells in kind_cells(plan)]) if several else ""
    legend = [("var(--p1)", "computing"), ("var(--s0)", "keys, values, swapped heads"), ("var(--p5)", "gradients")]
    kinds = zip(plan.share.groups, plan.own.time.kinds, strict=True)
    return table + "".join(_kind_timeline(plan, group, time, several) for group, time in kinds) + _legend(legend)


def _kind_timeline(plan: Plan, group: LayerGroup, time: KindTime, several: bool) -> str:
    drawn, words, y = [], [], 0
    strategy = plan.share.strategy_of(group.kind)
    for name, times in (("forward", time.forward), ("backward", time.backward)):
        steps = priced_steps(plan.share, strategy, name == "backward", group.kind)
        shown: list[Seconds | None] = list(steps)
        if len(steps) > 2 * SHOWN + 1:
            shown = [*steps[:SHOWN], None, *steps[-SHOWN:]]
        waiting = times.exposed / times.total if times.total else 0.0
        words.append(f"{name} {_short(times.total)}, {waiting:.0%} of it waiting")
        drawn.append(f'<text x="0" y="{y + 14}" font-weight="600">{name}</text>')
        drawn.append(_pass(shown, len(steps) - 2 * SHOWN, y + 22))
        y += 104
    places = f"{plan.share.ring} devices" if plan.share.ring > 1 else "one device"
    label = f"{group.layers} layers, {group.name}: {strategy.name}" if several else plan.own.label
    line = f"{label} on {places}: {'; '.join(words)}."
    return f'<p class="soft">{escape(line)}</p>' + _svg(y, drawn)


def _pass(shown: list[Seconds | None], left_out: int, y: int) -> str:
    left, real = 60, [step for step in shown if step]
    gap = max(max(step.total for step in real), 1e-12)
    scale = (WIDTH - left) / max(sum(step.total if step else gap for step in shown), 1e-12)
    drawn = [f'<text class="soft" x="0" y="{y + 18}">device</text><text class="soft" x="0" y="{y + 48}">link</text>']
    start = float(left)
    for step in shown:
        if step is None:
            middle = start + gap * scale / 2
            drawn.append(
                f'<text class="soft" x="{middle:.1f}" y="{y + 33}" text-anchor="middle">{left_out} more</text>'
            )
            start += gap * scale
            continue
        title = f"<title>computing {_short(step.compute)}, sending {_short(step.wire)}</title>"
        drawn.append(_bar(start, y, max(step.compute * scale - 1, 0), 26, "var(--p1)", title))
        drawn.append(_bar(start, y + 30, max(step.keys * scale - 1, 0), 26, "var(--s0)", title))
        drawn.append(
            _bar(start + step.keys * scale, y + 30, max(step.gradients * scale - 1, 0), 26, "var(--p5)", title)
        )
        start += step.total * scale
    return "".join(drawn)


def _strategies(plan: Plan) -> str:
    rows, classes = [], []
    for candidate in plan.candidates:
        time = candidate.time
        others = time.weights_wait + time.sums_wait + time.host_wait + time.memory_bound
        marks = ["fits" if candidate.fits else "too large"] + ["yours"] * (candidate.label == plan.own.label)
        figures = (time.total, time.dense, time.attention, time.attention_waits, others)
        cells = [candidate.label, *map(seconds, figures), f"{candidate.mfu:.0%}", f"{candidate.memory.total / GiB:.1f}"]
        rows.append((*cells, ", ".join(marks)))
        recommended = plan.recommended and candidate.label == plan.recommended.label
        classes.append("best" if recommended else "" if candidate.fits else "big")
    names = ("strategy", "step", "dense", "attention", "waits", "other", "MFU", "GiB", "")
    return _table(names, rows, classes)


def _map_data(plan: Plan, found: StrategyMap) -> dict:
    """What the map's sliders choose from: at each place the strategies, their seconds, whether they fit."""
    share = plan.share
    number = found.families.index
    cells = [
        [[(c.label, round(c.time.total, 6), c.fits, number(c.strategy.family)) for c in priced] for priced in row]
        for row in found.candidates
    ]
    nearest = (int(np.abs(np.log(found.tokens / share.tokens)).argmin()),)
    nearest += (int(np.abs(np.log(found.bandwidths / share.topology.chip.link)).argmin()),)
    return {
        "tokens": found.tokens.tolist(),
        "bandwidths": [round(bandwidth) for bandwidth in found.bandwidths],
        "families": found.families,
        "best": found.best.tolist(),
        "cells": cells,
        "own": nearest,
        "devices": share.ring,
    }


def _bar(x: float, y: float, width: float, height: int, fill: str, title: str) -> str:
    size = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"'
    return f'<rect {size} fill="{fill}">{title}</rect>' if width > 0 else ""


def _svg(height: int, drawn: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(drawn)}</svg>'


def _legend(entries: list[tuple[str, str]]) -> str:
    spans = (f'<span><i style="background:{color}"></i>{escape(name)}</span>' for color, name in entries)
    return f'<div class="legend">{"".join(spans)}</div>'


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table whose columns but the first and the last are of numbers, where there are more than two."""
    ends = {0, len(names) - 1}
    mark = ['class="n"' if i not in ends else "" for i in range(len(names))]
    head = "".join(f"<th {mark[i]}>{escape(name)}</th>" for i, name in enumerate(names))
    body = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td {mark[j]}>{escape(cell)}</td>" for j, cell in enumerate(row))
        body.append(f'<tr class="{classes[i] if classes else ""}">{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _short(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
