"""What is installed, what importing it costs, and what a package index shows."""

import ast
import importlib
import json
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import ring_attention as ra
from ring_attention.checks import TRAIN_MODULES, require_train

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ring_attention"
SETUP = runpy.run_path(str(ROOT / "setup.py"))
MODULE_OF = {"absl-py": "absl", "orbax-checkpoint": "orbax"}
"""What a distribution is imported as, where that is another name."""

ATTENTION_ROOMS = ("__init__.py", "attention", "checks.py", "hardware", "parallel", "testing.py")
EXEMPT = {"jaxlib", "ml_dtypes", "jax_plugins", "torch", "transformers", "ringattention"}
"""Modules that come with jax, and those of other extras, which are looked for where they are used."""

MEASURE = """
import json, time
start = time.process_time()
import jax
jax_done = time.process_time()
import ring_attention as ra
import_done = time.process_time()
[getattr(ra, name) for name in ra.__all__]
json.dump([t - start for t in (jax_done, import_done, time.process_time())], __import__("sys").stdout)
"""


def _declared(requirements):
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
    return {MODULE_OF.get(name, name) for name in names}


def _foreign_imports(paths):
    """Top-level modules of other distributions that these files import anywhere."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    return found - {*sys.stdlib_module_names} - {"ring_attention"} - EXEMPT


def _files(room):
    path = PACKAGE / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


TRAIN_ROOMS = sorted({path.name for path in PACKAGE.iterdir()} - {*ATTENTION_ROOMS, "py.typed", "__pycache__"})


def test_public_names_are_those_that_editors_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    seen = {alias.asname: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    modules = {name: f"ring_attention.{module}" for name, module in ra._MODULES.items()}
    assert seen == {
        name: f"{module}.{name}".replace(".testing.testing", ".testing") for name, module in modules.items()
    }
    assert {*ra.__all__} <= {*dir(ra)}
    for name, module in modules.items():
        assert getattr(ra, name) is getattr(importlib.import_module(module), name, ra.testing)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'ring_atention'"):
        ra.ring_atention  # noqa: B018


def test_import_takes_under_1_2_times_import_jax():
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=ROOT, check=True)
        runs.append(json.loads(done.stdout))
    imported = statistics.median(ours / jax for jax, ours, _ in runs)
    all_used = statistics.median(ours / jax for jax, _, ours in runs)
    print(f"import ring_attention {imported:.2f}, every public name {all_used:.2f} times import jax")
    assert imported < 1.2
    assert all_used < 1.5


def test_attention_imports_no_more_than_it_installs():
    files = [file for room in ATTENTION_ROOMS for file in _files(room)]
    assert _foreign_imports(files) == _declared(SETUP["ATTENTION"])


def test_train_declares_what_the_other_rooms_import():
    files = [file for room in TRAIN_ROOMS for file in _files(room)]
    assert _foreign_imports(files) - _declared(SETUP["ATTENTION"]) == _declared(SETUP["TRAIN"])


def test_require_train_looks_for_what_train_declares():
    assert {*TRAIN_MODULES} == _declared(SETUP["TRAIN"])


def test_every_extra_installs_what_train_does():
    assert all({*SETUP["TRAIN"]} <= {*requirements} for requirements in SETUP["EXTRAS"].values())


def test_require_train_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        require_train("ring_attention.training")
    want = "ring_attention.training needs grain, not installed; pip install 'ring_attention[train]'"
    assert str(caught.value).startswith(want)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.name is None  # by which commands know it, and print the line alone


def test_long_description_has_no_link_to_a_file_beside_it():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = r"\]\((?!https?:|#)"
    assert re.search(relative, readme)
    for repository in ("", "https://host.example/owner/ring_attention"):
        assert not re.search(relative, SETUP["make_long_description"](readme, repository))


def test_long_description_makes_links_absolute():
    make = SETUP["make_long_description"]
    text = "![a ring](docs/ring.png) [docs](docs/a.md#b) [paper](https://arxiv.org) [here](#x)"
    base = "https://host.example/r"
    links = f"[docs]({base}/blob/main/docs/a.md#b) [paper](https://arxiv.org) [here](#x)"
    assert make(text, base) == f"![a ring]({base}/raw/main/docs/ring.png) {links}"
    assert make(text, "") == " docs [paper](https://arxiv.org) [here](#x)"


def test_wheel_tells_type_checkers_that_it_has_types():
    assert (PACKAGE / "py.typed").exists()
