"""What the documentation promises: its programs run, its commands and files exist, its generated pages are fresh."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _slug(heading):
    """The anchor that a heading gets on the usual hosts."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _anchors(page):
    return {_slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


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
