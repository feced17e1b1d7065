"""Data are data: nothing that the package, its scripts or train.py reads can make them run code.

Configs are Python by design: `training/flags.py` runs the config file that the user names on the command line.
Everything else that is read is text, JSON, NumPy arrays or what orbax writes.
"""

import ast
import pathlib

import pytest

import ring_attention as ra

PACKAGE = pathlib.Path(ra.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("scripts/**/*.py"), *ROOT.glob("configs/*.py"), ROOT / "train.py"])

# Of modules that make objects, and so run code, from bytes.
UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickle5",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
}
UNPICKLING_CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pandas.read_pickle",
    "pd.read_pickle",
}
RUNNERS = {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"}

# Who runs a file of Python by its path: the user's config, and another installed package to compare with. checks.py
# only asks which packages are there.
RUN_FILES = {
    "runpy": {PACKAGE / "training" / "flags.py"},
    "importlib.util": {ROOT / "scripts" / "benchmarks" / "baselines.py", PACKAGE / "checks.py"},
}

NOTEBOOK_RUNNER = ROOT / "scripts" / "docs" / "run_notebook.py"
"""Runs the cells of the notebook that it is given, as its name says."""


def dangers(source):
    """What in a module's source could run code that is in data, a line each."""
    return [f"line {node.lineno}: {found}" for node in ast.walk(ast.parse(source)) for found in _dangers_of(node)]


def _dangers_of(node):
    if isinstance(node, ast.Import):
        yield from (f"import {alias.name}" for alias in node.names if alias.name.partition(".")[0] in UNPICKLERS)
    elif isinstance(node, ast.ImportFrom):
        if (node.module or "").partition(".")[0] in UNPICKLERS:
            yield f"import from {node.module}"
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        yield from sorted(names & (UNPICKLING_CALLS | RUNNERS))
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in UNPICKLING_CALLS | RUNNERS:
            yield f"{name}()"
        yield from (f"allow_pickle in {name}()" for word in node.keywords if _allows_pickle(word))


def _allows_pickle(word):
    """Whether a keyword argument lets NumPy unpickle: unless it is written False, it may."""
    return word.arg == "allow_pickle" and not (isinstance(word.value, ast.Constant) and word.value.value is False)


def users_of(module):
    """The files that import a module."""
    return {
        path
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(alias.name == module for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == module)
    }


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_file_can_run_code_that_is_in_data(path):
    found = [danger.partition(": ")[2] for danger in dangers(path.read_text())]
    assert sorted(found) == (["compile()", "exec()"] if path == NOTEBOOK_RUNNER else [])


def test_all_files_are_looked_at():
    names = {path.name for path in FILES}
    assert {"train.py", "files.py", "checkpoints.py", "flags.py", "tiny.py", "plan.py"} <= names
    assert len(FILES) > 100


@pytest.mark.parametrize("module", RUN_FILES)
def test_no_other_file_runs_files(module):
    assert users_of(module) == RUN_FILES[module]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import numpy, dill as d",
        "from cloudpickle import loads",
        "def late():\n    import marshal",
        "from joblib.numpy_pickle import load",
        "x = eval(text)",
        "exec(text, {})",
        "import builtins\nbuiltins.exec(text)",
        "from builtins import eval as read",
        "__import__(text)",
        "import torch\nx = torch.load(path)",
        "from torch import load",
        "import yaml\nx = yaml.load(text, yaml.Loader)",
        "import numpy as np\nx = np.load(path, allow_pickle=True)",
        "x = np.load(path, allow_pickle=flag)",
    ],
)
def test_a_made_up_danger_is_seen(line):
    assert dangers("import json\n" + line) != []


@pytest.mark.parametrize(
    "line",
    [
        "x = np.load(path, allow_pickle=False)",
        "x = json.loads(text)",
        "x = yaml.safe_load(text)",
        "compiled = lowered.compile()",
        "model.eval()",
        "x = ast.literal_eval(text)",
    ],
)
def test_what_is_harmless_is_not_taken_for_one(line):
    assert dangers(line) == []
