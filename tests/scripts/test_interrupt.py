"""Ctrl-C is one line and exit status 130 in every program, while its modules load and after."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = [
    REPOSITORY / "train.py",
    *(file for file in sorted(REPOSITORY.glob("scripts/*.py")) if file.name != "interrupt.py"),
]

SLOW_MODULE = """
import time
print("loading", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt as error:
    raise ImportError("as extension modules word it") from error
"""

LOADED = """
class Console:
    def __init__(self, *args, **kwargs):
        print("running", flush=True)
        {body}
"""
BODIES = {
    "in the program": "import time; time.sleep(60)",
    "in a callback whose errors Python ignores": """import time
        class Collected:
            def __del__(self): time.sleep(60)
        Collected()
        time.sleep(60)""",
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda file: file.name)
def test_every_program_is_guarded_before_it_loads_anything_else(program):
    tree = ast.parse(program.read_text())
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert [alias.name for alias in first.names] == ["interrupt"]
    assert "main" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], "the guard looks for it"


def interrupt(tmp_path, module, source, word):
    """Run worked_example.py with `source` in the place of a module, and interrupt it there."""
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text(source)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-u", "scripts/worked_example.py"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=REPOSITORY, env=env, **pipes)
    try:
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, stderr


def test_while_modules_load_even_where_one_would_catch_it(tmp_path):
    assert interrupt(tmp_path, Path("rich", "__init__.py"), SLOW_MODULE, "loading") == (130, "Interrupted.\n")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_while_it_runs(tmp_path, body):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("")
    (tmp_path / "rich" / "table.py").write_text("class Table: pass\nclass Column: pass")
    (tmp_path / "rich" / "text.py").write_text("class Text: pass")
    source = LOADED.format(body=body)
    assert interrupt(tmp_path, Path("rich", "console.py"), source, "running") == (130, "Interrupted.\n")


def test_other_errors_still_have_their_traceback(tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ValueError('seen')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, "scripts/worked_example.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: seen\n")
