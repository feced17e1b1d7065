import ast
import pathlib
import subprocess
import sys

import pytest

import ring_attention as ra

PACKAGE = pathlib.Path(ra.__file__).parent
ROOMS = (
    "__main__",
    "commands",
    "configs",
    "doctor",
    "planning",
    "evaluation",
    "inference",
    "training",
    "data",
    "models",
    "testing",
    "parallel",
    "attention",
    "hardware",
    "tables",
    "json_files",
    "checks",
)
"""Top to bottom, as DESIGN.md orders them: a room imports those to its right."""

STRANGERS = {("data", "models"), ("models", "data")}
LONGEST_MODULE, LONGEST_FUNCTION = 300, 50  # lines; a function's without its docstring


def _read_sources():
    """Module name -> source, for every module of the package."""
    sources = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ["ring_attention", *path.relative_to(PACKAGE).with_suffix("").parts]
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def _imports(sources):
    """Module name -> names of the package's modules that it imports, anywhere in its source."""
    graph = {}
    for name, source in sources.items():
        targets = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively; name the module in full"
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {f"{n}" for n in inner if n in sources} or {node.module}
                targets |= {node.module} if any(n not in sources for n in inner) else set()
        graph[name] = {target for target in targets if target in sources}
    return graph


def _room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def _wrong_imports(graph):
    """Pairs (module, what it must not import)."""
    wrong = set()
    for module, targets in graph.items():
        room = _room(module)
        if room is None:  # the package's own __init__, above all rooms
            continue
        for target in targets:
            other = _room(target)
            upward = other is None or ROOMS.index(other) < ROOMS.index(room)
            if upward or (room, other) in STRANGERS:
                wrong.add((module, target))
    return wrong


def _circle(graph):
    """Modules that import each other in a circle, in order, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        for target in sorted(graph[module]):
            if found := visit(target):
                return found
        done.add(path.pop())
        return None

    return next((found for module in sorted(graph) if (found := visit(module))), None)


SOURCES = _read_sources()
GRAPH = _imports(SOURCES)


def test_every_module_is_in_a_room_that_the_design_knows():
    assert {_room(module) for module in GRAPH} - {None} <= set(ROOMS)
    assert len(GRAPH) > 30
    assert "ring_attention.checks" in GRAPH["ring_attention.parallel.context"]


def test_no_room_imports_one_above_it():
    assert _wrong_imports(GRAPH) == set()


def test_no_modules_import_each_other_in_a_circle():
    assert _circle(GRAPH) is None


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ring_attention.attention.masks", "from ring_attention.parallel.mesh import DATA"),
        ("ring_attention.parallel.ring", "import ring_attention.training.step"),
        ("ring_attention.checks", "from ring_attention.attention import masks"),
        ("ring_attention.data.packing", "from ring_attention.models.config import ModelConfig"),
        ("ring_attention.models.rope", "def late():\n    from ring_attention.data import config"),
        ("ring_attention.parallel.mesh", "import ring_attention"),
    ],
)
def test_a_made_up_upward_import_is_seen(module, line):
    graph = _imports(SOURCES | {module: f"{SOURCES[module]}\n{line}\n"})
    assert {source for source, _ in _wrong_imports(graph)} == {module}


def test_a_made_up_circle_is_seen():
    module = "ring_attention.attention.masks"
    circle = _circle(_imports(SOURCES | {module: "from ring_attention.attention import blockwise\n"}))
    assert circle is not None
    assert module in circle
    assert circle[0] == circle[-1]


def _function_lengths(source):
    """(lines without the docstring, name) of each function of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            without = len(docstring.splitlines()) if docstring else 0
            yield node.end_lineno - node.lineno + 1 - without, node.name


SCRIPTS = {str(path): path.read_text(encoding="utf-8") for path in (PACKAGE.parent / "scripts").rglob("*.py")}


def test_modules_fit_on_a_few_screens():
    lengths = {name: len(source.splitlines()) for name, source in (SOURCES | SCRIPTS).items()}
    assert {name: n for name, n in lengths.items() if n > LONGEST_MODULE} == {}


def test_functions_fit_on_a_screen():
    lengths = {(file, name): n for file, source in (SOURCES | SCRIPTS).items() for n, name in _function_lengths(source)}
    assert {where: n for where, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_function_lengths_leave_the_docstring_out():
    assert list(_function_lengths('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n')) == [(2, "f")]


IMPORTS = """
import jax
import ring_attention, ring_attention.training.flags, ring_attention.training.config
from jax._src import xla_bridge
{touch}
print(len(xla_bridge._backends))
"""


@pytest.mark.parametrize(("touch", "started"), [("", False), ("jax.devices()", True)], ids=["import", "control"])
def test_importing_starts_no_backend_so_that_jax_distributed_still_can(touch, started):
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(touch=touch)],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert (int(run.stdout) > 0) == started
