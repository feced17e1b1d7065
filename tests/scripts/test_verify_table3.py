import dataclasses
import json

import jax
import pytest

from scripts.verify import table3

MESSAGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (23.72G) exceeds "
    "available HBM (15.75G)."
)
NAME = "7B/v5e:16x16"


def _row(name, times, fits=True):
    return table3.Row(
        cell=name,
        times=times,
        tokens=times * table3.CELLS[name].paper * 1024,
        fits=fits,
        needed=2**30,
        memory=2**34,
        state=2**20,
        host=0,
        host_memory=2**36,
        bound="one layer's activations",
        settings=dataclasses.asdict(table3.CELLS[name]),
        seconds=1.0,
        versions=table3.versions_of(name),
    )


def _run(monkeypatch, rows, *arguments):
    """(exit status, cells compiled) of the script, where compiling gives `rows`."""
    compiled = []

    def compile_row(name, times):
        compiled.append((name, times))
        return rows[name, times]

    monkeypatch.setattr(table3, "compile_row", compile_row)
    return table3.main(["--cells", NAME, *map(str, arguments)]), compiled


@pytest.mark.parametrize("name", table3.CELLS)
def test_config_of_has_the_papers_context(name):
    once, four_times = (table3.config_of(name, times) for times in (1, 4))
    assert once.seq_len == table3.CELLS[name].paper * 1024
    assert four_times.seq_len == 4 * once.seq_len
    assert once.model.num_kv_heads == once.model.num_heads
    billions = float(name.partition("B/")[0])
    assert once.model.num_parameters == pytest.approx(billions * 1e9, rel=0.15)


def _compile_refused(monkeypatch, message):
    """The row of a step that the compiler refuses with this message."""

    def refuse(config, devices):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(table3, "pod_devices", lambda topology: [])
    monkeypatch.setattr(table3, "compile_step", refuse)
    return table3.compile_row(NAME, 1)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (MESSAGE, int(23.72 * 2**30)),
        ("RESOURCE_EXHAUSTED: Used 1.50M of 15.75G hbm", int(1.5 * 2**20)),
        ("RESOURCE_EXHAUSTED: Used 1.00M of 1.00M smem", 0),  # not the memory that is meant
        ("INTERNAL: another reason", 0),
    ],
)
def test_compile_row_reads_a_compilers_refusal(monkeypatch, message, needed):
    row = _compile_refused(monkeypatch, message)
    assert (row.needed, row.fits) == (needed, False)
    assert ("the compiler failed" in row.bound) == (needed == 0)


def test_table3_compiles_no_row_twice(monkeypatch, tmp_path):
    out, rows = tmp_path / "rows.json", {(NAME, times): _row(NAME, times) for times in (1, 4)}
    assert _run(monkeypatch, rows, "--out", out, "--times", 1) == (0, [(NAME, 1)])
    assert _run(monkeypatch, rows, "--out", out) == (0, [(NAME, 4)])
    assert _run(monkeypatch, rows, "--out", out) == (0, [])
    older = [row | {"versions": {"jax": "0.1"}} for row in json.loads(out.read_text())]
    out.write_text(json.dumps(older))
    assert _run(monkeypatch, rows, "--out", out) == (0, [(NAME, 1), (NAME, 4)])


def test_table3_fails_for_contexts_of_the_paper_alone(monkeypatch):
    rows = {(NAME, 1): _row(NAME, 1), (NAME, 4): _row(NAME, 4, fits=False)}
    assert _run(monkeypatch, rows)[0] == 0
    rows[NAME, 1] = _row(NAME, 1, fits=False)
    assert _run(monkeypatch, rows)[0] == 1
