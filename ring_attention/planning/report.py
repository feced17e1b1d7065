"""A plan as a person reads it: tables for the terminal, and the same as JSON."""

import dataclasses

from rich.table import Table

from ring_attention.hardware.chips import GiB
from ring_attention.hardware.paper import PAPER_TABLE_2
from ring_attention.hardware.rates import Wires, wires_of
from ring_attention.planning.advice import ADVISED, Advice
from ring_attention.planning.hiding import paper_tokens, tokens_to_hide
from ring_attention.planning.plan import Plan
from ring_attention.planning.step_times import pace_of, schedule_of, sent_bytes

FIGURES = {
    "flops": ("{:.1f} TFLOP/s bfloat16", 1e12),
    "memory": ("{:.1f} GiB HBM", GiB),
    "memory_bandwidth": ("{:.0f} GB/s to its HBM", 1e9),
    "link": ("{:.0f} GB/s a link one way", 1e9),
    "links": ("{:.0f} links", 1),
    "network": ("{:.1f} GB/s to other hosts or slices", 1e9),
    "host_memory": ("{:.0f} GiB of its host's memory", GiB),
    "host_link": ("{:.0f} GB/s to that, one way", 1e9),
}


def hardware_rows(plan: Plan) -> list[tuple[str, str]]:
    """List every hardware figure that the plan rests on, and where it comes from."""
    chip, topology = plan.share.topology.chip, plan.share.topology
    reach, pace = topology.reach, pace_of(plan.share)
    rows = [(words.format(getattr(chip, name) / unit), chip.sources[name]) for name, (words, unit) in FIGURES.items()]
    parts = ("matmul", "of its operations in dense layers"), ("memory", "of its HBM's rate"), ("link", "of a link's")
    reached = ", ".join(f"{getattr(reach, name):.0%} {words}" for name, words in parts)
    rows.append((f"reached: {reached}, {reach.network:.0%} of the network's", reach.source))
    rate = topology.kernel_rate(plan.share.attention.kernel.name, plan.share.head_width)
    words = f"attention by {rate.kernel}: {pace.forward / 1e12:.0f} and {pace.backward / 1e12:.0f} TFLOP/s, forward and"
    return [*rows, (f"{words} backward", rate.source)]


def hardware_table(plan: Plan) -> Table:
    """Tabulate `hardware_rows`."""
    topology = plan.share.topology
    table = Table(title=f"{topology.name}: {topology.devices} devices", show_header=True)
    table.add_column("a device")
    table.add_column("source", overflow="fold")
    for row in hardware_rows(plan):
        table.add_row(*row)
    return table


def memory_table(plan: Plan, measured: int | None = None) -> Table:
    """Tabulate memory of a device by part; beside the sum what the compiler says, if it was asked."""
    chip = plan.share.topology.chip
    table = Table(title="Memory of a device")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("of its memory", justify="right")
    for name, size in plan.memory.parts.items():
        table.add_row(name, f"{size / GiB:.2f}", f"{size / chip.memory:.0%}")
    table.add_section()
    style = "" if plan.memory.total <= chip.memory else "red"
    table.add_row("predicted", f"{plan.memory.total / GiB:.2f}", f"{plan.memory.total / chip.memory:.0%}", style=style)
    if measured is not None:
        style = "bold" if measured <= chip.memory else "bold red"
        table.add_row("compiler", f"{measured / GiB:.2f}", f"{measured / chip.memory:.0%}", style=style)
        table.caption = f"prediction over compiler: {plan.memory.total / measured:.2f}"
    if plan.memory.host:
        table.add_row(
            "on the host", f"{plan.memory.host / GiB:.2f}", f"{plan.memory.host / chip.host_memory:.0%} of the host's"
        )
    return table


def wire_table(plan: Plan) -> Table:
    """Tabulate what a device sends in a step, and how long its wires take for that."""
    share = plan.share
    table = Table(title="Sent by a device in a step")
    for name in ("what (mesh axes)", "over"):
        table.add_column(name)
    for name in ("GB", "alone, ms"):
        table.add_column(name, justify="right")
    tp, dp = share.mesh["tp"], share.mesh["dp"]
    groups = [(share.ring, tp), (share.owners, tp), (tp, 1), (dp, share.devices // dp)]
    for row, ((name, size), (group, stride)) in enumerate(zip(sent_bytes(share).items(), groups, strict=True)):
        if size:
            wires = wires_of(share.topology, group, stride)
            alone = size / wires.gather if row else _attention_alone(plan, wires)
            table.add_row(name, wires.kind, f"{size / 1e9:.2f}", f"{alone * 1e3:.0f}")
    return table


def _attention_alone(plan: Plan, wires: Wires) -> float:
    """The seconds that wires take for what attention sends, each kind of layer in the way in which it sends first."""
    share, seconds = plan.share, 0.0
    for group, time in zip(share.groups, plan.own.time.kinds, strict=True):
        way = schedule_of(share, share.strategy_of(group.kind), kind=group.kind).steps[0].way
        seconds += time.sent / getattr(wires, way)
    return seconds


def kind_rows(plan: Plan) -> list[dict]:
    """What each kind of layer adds to a step of the config as it is: its attention's seconds, bytes and shares."""
    sent = sent_bytes(plan.share).values()
    of_attention = sum(kind.sent for kind in plan.own.time.kinds)
    return [
        dict(
            kind=kind.name,
            layers=kind.layers,
            strategy=kind.strategy,
            attention_seconds=kind.compute + kind.waits,
            sent_bytes=kind.sent,
            share_of_attention=kind.sent / max(of_attention, 1),
            share_of_wire=kind.sent / max(sum(sent), 1),
        )
        for kind in plan.own.time.kinds
    ]


KIND_COLUMNS = ("kind of layer", "layers", "strategy", "attention, s", "MiB sent", "of attention's", "of all sent")


def kind_cells(plan: Plan) -> list[tuple[str, ...]]:
    """Word `kind_rows`, a cell for each of `KIND_COLUMNS`."""
    return [
        (
            row["kind"],
            str(row["layers"]),
            row["strategy"],
            _seconds(row["attention_seconds"]),
            f"{row['sent_bytes'] / 2**20:,.1f}",
            f"{row['share_of_attention']:.2%}",
            f"{row['share_of_wire']:.2%}",
        )
        for row in kind_rows(plan)
    ]


def kind_table(plan: Plan) -> Table:
    """Tabulate what each kind of layer computes and sends."""
    table = Table(title="Attention by kind of layer", caption="of a device in a step, waits for transfers included")
    for name in KIND_COLUMNS:
        left = name in ("kind of layer", "strategy")
        table.add_column(name, justify="left" if left else "right")
    for cells in kind_cells(plan):
        table.add_row(*cells)
    return table


def hiding_table(plan: Plan) -> Table:
    """Tabulate the tokens that a device must hold so that nobody waits for the ring, beside those that it holds."""
    t, of_kind = plan.share.tokens, f", {plan.share.groups[0].name} layers" * (len(plan.share.groups) > 1)
    table = Table(
        title=f"Tokens of a device from which a ring waits for nothing{of_kind}",
        caption=f"here {t:,} tokens; a hop's computation beside the link's time for what travels meanwhile",
    )
    table.add_column("attention")
    table.add_column("at the peak", justify="right")
    table.add_column("at the kernel's rate", justify="right")
    for row in plan.hiding:
        cells = [
            f"[red]{tokens:,.0f}[/red]" if tokens > t else f"{tokens:,.0f}" for tokens in (row.at_peak, row.at_pace)
        ]
        table.add_row(row.name, *cells)
    return table


def strategy_table(plan: Plan) -> Table:
    """Tabulate the step by every strategy, the fastest first."""
    table = Table(
        title="A step by each strategy",
        caption="seconds predicted; waits: for attention's transfers; other: waits for weights, sums, the host "
        "and the optimizer; yours: the config's own",
    )
    table.add_column("strategy")
    for name in ("step", "MFU", "dense", "attn", "waits", "other", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for candidate in plan.candidates:
        time = candidate.time
        others = time.weights_wait + time.sums_wait + time.host_wait + time.memory_bound
        marks = ["fits" if candidate.fits else "too large"]
        marks += ["yours"] * (candidate.label == plan.own.label)
        style = "" if candidate.fits else "red"
        if plan.recommended and candidate.label == plan.recommended.label:
            style = "bold green"
        cells = [_seconds(x) for x in (time.dense, time.attention, time.attention_waits, others)]
        gib = f"{candidate.memory.total / GiB:.1f}"
        table.add_row(
            candidate.label,
            _seconds(time.total),
            f"{candidate.mfu:.0%}",
            *cells,
            gib,
            ", ".join(marks),
            style=style,
        )
    return table


def _seconds(seconds: float) -> str:
    """Word the seconds of a step: with hundredths, where there are fewer than 100."""
    return f"{seconds:.2f}" if seconds < 100 else f"{seconds:.1f}"


def paper_table() -> Table:
    """Tabulate Table 2 of the Ring Attention paper: printed, and by its own formula."""
    table = Table(title="Ring Attention paper, Table 2", caption="thousands of tokens: printed | by its formula")
    for name in ("hardware", "TFLOP/s", "GB/s", "block", "tokens of a device", "causal", "causal, 4 queries a key"):
        left = name == "hardware"
        table.add_column(name, justify="left" if left else "right")
    for row in PAPER_TABLE_2:
        block, tokens = paper_tokens(row)
        forms = [
            tokens_to_hide(row.flops, row.bandwidth, causal=True, queries_per_key=groups) * 6 / 1e3 for groups in (1, 4)
        ]
        table.add_row(
            row.hardware,
            f"{row.flops / 1e12:.0f}",
            f"{row.bandwidth / 1e9:g}",
            f"{row.block} | {block:.1f}",
            f"{row.tokens} | {tokens:.1f}",
            *(f"{tokens:.1f}" for tokens in forms),
        )
    return table


def as_json(plan: Plan, advice: Advice | None = None) -> dict:
    """Convert a plan, and the advice beside it, to what JSON can hold."""
    share = plan.share
    advised = {name: getattr(advice, name) for name in ADVISED} if advice else {}
    candidate = lambda c: {  # noqa: E731
        "strategy": c.label,
        "flags": c.flags(share.config),
        "fits": c.fits,
        "step_seconds": c.time.total,
        "mfu": c.mfu,
        "memory_bytes": c.memory.total,
        "time": dataclasses.asdict(c.time),
    }
    return {
        "config": share.config.name,
        "topology": share.topology.name,
        "devices": share.devices,
        "mesh": share.mesh,
        "seq_len": share.config.seq_len,
        "tokens_per_device": share.tokens,
        "parameters": share.config.transformer.num_parameters,
        "model_flops": plan.model_flops,
        "hardware": {k: v for k, v in dataclasses.asdict(share.topology.chip).items() if k != "kinds"},
        "reach": dataclasses.asdict(share.topology.reach),
        "attention_rate": dataclasses.asdict(share.topology.kernel_rate(share.attention.kernel.name, share.head_width)),
        "memory": {
            "parts": plan.memory.parts,
            "total": plan.memory.total,
            "host": plan.memory.host,
            "available": share.topology.chip.memory,
        },
        "sent_bytes": sent_bytes(share),
        "kinds": kind_rows(plan),
        "tokens_to_hide": [dataclasses.asdict(row) for row in plan.hiding],
        "strategies": [candidate(c) for c in plan.candidates],
        "recommended": plan.recommended and plan.recommended.label,
        "reason": plan.reason,
        "longest_context": plan.longest,
        "advice": {
            name: c and candidate(c) | {"topology": c.share.topology.name, "seq_len": c.share.config.seq_len}
            for name, c in advised.items()
        },
    }
