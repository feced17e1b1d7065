"""What the documentation promises: its programs run, its commands and files exist, its generated pages are fresh."""

import contextlib
import functools
import importlib
import io
import json
import re
import runpy
from pathlib import Path

import pytest
from command_lines import call_command

from ring_attention.commands.console import COMMANDS
from scripts import launch_local

ROOT = Path(__file__).parent.parent
LISTING = runpy.run_path(str(ROOT / "scripts/docs/list_commands.py"))
PAGES = LISTING["PAGES"]
CHEAP = (
    ["python", "scripts/plan.py", "--config=configs/tpu_v5e_256_7b.py", "--topology=v5e:16x16"],
    ["python", "scripts/make_small_hf.py", "--out=small-hf"],
    ["python", "-m", "scripts.verify", "ranking"],
    ["python", "-m", "scripts.figures", "worked_example"],
)
"""Commands of the pages that run as they are written, in seconds."""


def _slug(heading):
    """The anchor that a heading gets on the usual hosts."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _anchors(page):
    return {_slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def _main_and_flags(words):
    """The function that these words of a command run, and the words after its name; None if it is not ours."""
    if words[:2] == ["python", "-m"] and words[2].startswith("scripts."):
        folder = importlib.import_module(f"{words[2]}.__main__")
        return importlib.import_module(folder.COMMANDS[words[3]].module).main, words[4:]
    if words[0] == "ring-attention":
        return importlib.import_module(COMMANDS[words[1]].module).main, words[2:]
    if words[0] != "python":
        return None
    name = Path(words[1]).stem
    assert (ROOT / words[1]).exists(), words[1]
    if name == "launch_local":
        return launch_local.main, words[2:]
    command = {"import_hf": "import", "export_hf": "export"}.get(name, name)
    return importlib.import_module(COMMANDS[command].module).main, words[2:]


@functools.cache
def _help(main, *subcommand):
    """What a command prints when it is asked for help."""
    with io.StringIO() as out, contextlib.redirect_stdout(out):
        assert call_command("command", main, *subcommand, "--help") == 0
        return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_and_take_their_flags(page):
    fields = _help(importlib.import_module(COMMANDS["train"].module).main)
    for _, words in LISTING["find_commands"](page):
        files = [word for word in words if word.startswith(("tests/", "scripts/", "configs/")) and "NAME" not in word]
        assert all((ROOT / file).exists() for file in files), words
        found = _main_and_flags(words)
        if found is None:
            continue
        main, rest = found
        name = rest[0] if rest and not rest[0].startswith("-") else None
        subcommand = [name] if name and re.search(rf"^ +{re.escape(name)}\b", _help(main), re.MULTILINE) else []
        known = fields + _help(main) + _help(main, *subcommand)
        flags = [word.partition("=")[0] for word in rest if word.startswith("--") and word != "--"]
        missing = [flag for flag in flags if not re.search(rf"{re.escape(flag)}(?![\w.])", known)]
        assert not missing, words


@pytest.mark.slow
@pytest.mark.parametrize("words", CHEAP, ids=lambda words: words[-1])
def test_cheap_commands_run_as_written(words, tmp_path, monkeypatch, capsys):
    assert words in [found for page in PAGES for _, found in LISTING["find_commands"](page)]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    main, flags = _main_and_flags(words)
    assert not call_command("command", main, *flags), capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.slow
def test_programs_of_your_model_page_run():
    text = (ROOT / "docs/your_model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 6
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/your_model.md", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if target.startswith(("http:", "https:")):
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            broken.append(target)
    assert not broken


def test_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    linked = {*re.findall(r"\]\(([\w.]+\.md)[)#]", index)}
    assert linked >= {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_workflow_runs_the_pythons_that_are_declared():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    declared = sorted(int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", setup))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    used = [int(minor) for minor in re.findall(r"^ +3\.(\d+)$", workflow, re.MULTILINE)]
    assert used == [declared[0], declared[-1]]


def test_api_page_is_what_the_docstrings_say():
    script = ROOT / "scripts/docs/write_api.py"
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(script))["make_page"](), f"run python {script.relative_to(ROOT)}"


@pytest.mark.slow
def test_notebook_runs_and_keeps_its_outputs():
    notebook = json.loads((ROOT / "examples/ring_attention.ipynb").read_text(encoding="utf-8"))
    done = runpy.run_path(str(ROOT / "scripts/docs/run_notebook.py"))["execute"](notebook)
    cells = [(old, new) for old, new in zip(notebook["cells"], done["cells"], strict=True) if "outputs" in old]
    assert len(cells) > 6
    for old, new in cells:
        kinds = [[output["output_type"] for output in cell["outputs"]] for cell in (old, new)]
        assert kinds[0] == kinds[1]
