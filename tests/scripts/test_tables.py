"""Tables at a terminal of 80 columns: no line is longer, and no figure is cut."""

import io
import re
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from ring_attention.evaluation.needle_report import HeatMap, accuracy_table
from ring_attention.hardware.topology import find_topology
from ring_attention.planning import compile_report, report
from ring_attention.planning.plan import make_plan
from ring_attention.tables import fitted, show
from ring_attention.training.flags import load_config

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = [*(REPOSITORY / "scripts").rglob("*.py"), *(REPOSITORY / "ring_attention").rglob("*.py")]


def printed(table, width=80):
    out = io.StringIO()
    show(table, Console(file=out, width=width))
    return out.getvalue()


def check(table):
    text = printed(table)
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text
    words = re.findall(r"[^\s\u2500-\u257f]+", text)
    for column in table.columns:
        for cell in column.cells:
            if column.justify == "right":
                assert re.sub(r"\[/?[a-z ]+\]", "", cell) in text
            else:
                assert set(re.sub(r"\[/?[a-z ]+\]", "", cell).split()) <= set(words)
        assert set(column.header.split()) <= set(words)


@pytest.mark.parametrize(("config", "pod"), [("gpu_8xh100_7b", "h100:1x8"), ("tpu_v5e_256_7b", "v5e:16x16")])
def test_every_table_of_a_plan_fits(config, pod):
    plan = make_plan(load_config(f"configs/{config}.py"), find_topology(pod))
    for table in (report.wire_table, report.hiding_table, report.strategy_table, report.hardware_table):
        check(table(plan))
    check(report.memory_table(plan, measured=10**10))
    assert len(fitted(report.strategy_table(plan), 80)) == 1


def test_tables_of_the_paper_and_of_a_compiled_step_fit():
    check(report.paper_table())
    collective = types.SimpleNamespace(
        kind="collective-permute", axes="dp,fsdp,sp,tp", runs=123_456_789, bytes=10**13, sent=10**13, instructions=1234
    )
    transfer = types.SimpleNamespace(
        phase="backward",
        axes="fsdp,sp",
        runs=123_456,
        bytes=10**11,
        link_seconds=12.345,
        compute_seconds=234.567,
        exposed_seconds=1.5,
        asynchronous=True,
        hidden=False,
    )
    compiled = types.SimpleNamespace(collectives=[collective] * 2, transfers=[transfer] * 2)
    check(compile_report.collectives_table(compiled))
    check(compile_report.transfers_table(compiled))


def test_heat_map_parts_all_begin_with_the_depth():
    lengths, depths = [2**n for n in range(8, 24)], [0.0, 0.5, 1.0]
    table = accuracy_table(HeatMap(title="t", lengths=lengths, depths=depths, accuracy=np.ones((3, 16))))
    check(table)
    assert printed(table).count("depth") == len(fitted(table, 80)) > 1


def test_fitted_leaves_a_table_that_fits_as_one():
    table = Table(title="title", caption="caption")
    for name in ("name", *"abcdefgh"):
        table.add_column(name, justify="left" if name == "name" else "right")
    table.add_row("one of them", *["1234567890"] * 8)
    check(table)
    assert len(fitted(table, 80)) == 2
    assert len(fitted(table, 130)) == 1
    for width in (80, 130):
        assert printed(table, width).count("title") == printed(table, width).count("caption") == 1


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_no_program_prints_a_table_by_itself(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"Console\([^)]*width=", text)
    if "rich.table" in text and path.name != "tables.py":
        assert not re.search(r"print\((table\b|[a-z_.]*_?table(_of)?[a-z_]*\()", text)


def test_fitted_begins_every_part_with_the_key_columns():
    table = Table()
    table.add_column("P", justify="right")
    table.add_column("program")
    for name in "abcdefgh":
        table.add_column(name, justify="right")
    table.add_row("8", "forward", *["1234567890"] * 8)
    begun = [[column.header for column in part.columns][:2] for part in fitted(table, 80, keys=2)]
    assert begun == [["P", "program"]] * 2
