"""Does the planner know how long it takes? Its seconds beside those of whole steps and of attention that are known.

  python -m scripts.verify times
  python -m scripts.verify times --steps

Three tables: steps that we measured on one H100; steps that others published, by source; and attention alone, as
MagiAttention's authors charted it on 8 to 64 H100s. --steps prints every published step, with what its source leaves
open. Half of the published steps set constants of the planner, the other half is held out; names decide which
(`published_steps.all_steps`). The exit status is 1 if fewer than 80% of those that are held out are planned at 0.75 to
1.33 of what was published.
"""

import itertools
import statistics
from collections.abc import Iterable

from rich.table import Table

from ring_attention.commands.arguments import Parser
from ring_attention.tables import show
from scripts.verify.published import ATTENTION_ALONE, planned_rate
from scripts.verify.published_steps import PublishedStep, all_steps

LOW, HIGH, SHARE = 0.75, 1.33, 0.8


def ratio_of(step: PublishedStep) -> float:
    """Planned seconds over those that are known."""
    return step.planned().total / step.seconds


def within(ratios: Iterable[float]) -> list[float]:
    """Those that are near enough."""
    return [ratio for ratio in ratios if LOW <= ratio <= HIGH]


def step_table(title: str, steps: dict[str, list[PublishedStep]], assumed: bool) -> Table:
    """Every step, of each kind."""
    table = Table(title=title)
    for name in ("step", "pod", "seconds", "planned", "ratio", "kind", *["left open"] * assumed):
        right = name in ("seconds", "planned", "ratio")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for kind, members in steps.items():
        for step in members:
            ratio = ratio_of(step)
            style = "" if within([ratio]) else "red"
            cells = [step.id, step.topology, f"{step.seconds:.4g}", f"{ratio * step.seconds:.4g}", f"{ratio:.2f}", kind]
            table.add_row(*cells, *["; ".join(step.assumed)] * assumed, style=style)
    return table


def source_table(steps: dict[str, list[PublishedStep]]) -> Table:
    """How many steps of each source are near, and the ratio in their middle."""
    table = Table(title="Steps that others published: planned over published")
    for name in ("source", "chip"):
        table.add_column(name, overflow="fold")
    for kind in steps:
        table.add_column(kind, justify="right")
    by_source = lambda step: (step.source, step.topology.partition(":")[0])  # noqa: E731
    everything = sorted(itertools.chain(*steps.values()), key=by_source)
    for (source, chip), members in itertools.groupby(everything, key=by_source):
        members = list(members)
        cells = []
        for of_kind in steps.values():
            ratios = [ratio_of(step) for step in members if step in of_kind]
            cells.append(f"{len(within(ratios))} of {len(ratios)}, {statistics.median(ratios):.2f}" if ratios else "")
        table.add_row(source, chip, *cells)
    table.add_section()
    ratios = [[ratio_of(step) for step in of_kind] for of_kind in steps.values()]
    table.add_row("all", "", *(f"{len(within(x))} of {len(x)}, {statistics.median(x):.2f}" for x in ratios))
    table.caption = f"how many lie within {LOW} and {HIGH}, and their median"
    return table


def attention_table() -> tuple[Table, list[float]]:
    """TFLOP/s a GPU of attention alone, and the ratios."""
    table = Table(title="Attention alone on H100, 64:8 heads, 8,192 tokens a GPU, causal: TFLOP/s a GPU")
    table.add_column("strategy, pass")
    for devices in (8, 16, 32, 64):
        table.add_column(f"{devices} GPUs", justify="right")
    ratios = []
    for (strategy, backward), rates in ATTENTION_ALONE.items():
        cells = []
        for devices, rate in rates.items():
            planned = planned_rate(strategy, devices, backward)
            ratios.append(planned / rate)
            cells.append(f"{rate} | {planned:.0f}")
        table.add_row(f"{strategy}, {'backward' if backward else 'forward'}", *cells)
    table.caption = "published | planned; the kernel of the source is FlashAttention-3, ours cuDNN"
    return table, ratios


def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", action="store_true", help="every published step, with what its source leaves open")
    args = parser.parse_args(argv)
    steps = all_steps()
    measured = {"measured": steps.pop("measured")}
    show(step_table("Steps on one H100", measured, assumed=False))
    if args.steps:
        show(step_table("Steps that others published", steps, assumed=True))
    show(source_table(steps))
    table, ratios = attention_table()
    show(table)
    print(f"attention alone: {len(within(ratios))} of {len(ratios)} within {LOW} and {HIGH}")
    held = [ratio_of(step) for step in steps["held out"]]
    print(f"steps held out: {len(within(held))} of {len(held)} ({len(within(held)) / len(held):.0%})")
    return 0 if len(within(held)) >= SHARE * len(held) else 1
