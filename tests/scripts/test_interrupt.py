"""Ctrl-C is one line and exit status 130 in every program, while its modules load and after."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
WRAPPERS = [
    REPOSITORY / "train.py",
    *(file for file in sorted(REPOSITORY.glob("scripts/*.py")) if file.name != "launch_local.py"),  # loads no JAX
    *sorted(REPOSITORY.glob("scripts/*/__main__.py")),
]
LIGHT = {"ring_attention.commands.console", "ring_attention.commands.program"}

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


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_wrapper_loads_nothing_heavy_before_ctrl_c_is_heard(wrapper):
    tree = ast.parse(wrapper.read_text())
    assert {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} <= LIGHT
    assert {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names} <= {"sys"}


def test_what_wrappers_load_is_light():
    script = f"import sys, {', '.join(LIGHT)}\nprint('jax' in sys.modules, 'numpy' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


HEAR_INTERRUPTS = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
"""Runs the command behind it: what a shell runs in the background, and what that starts, does not hear SIGINT."""


def interrupt(tmp_path, module, source, word):
    """Run the worked example with `source` in the place of a module, and interrupt it there."""
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text(source)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HEAR_INTERRUPTS, sys.executable, "-u", "-m", "scripts.figures", "worked_example"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=REPOSITORY, env=env, **pipes) as process:
        try:
            assert process.stdout.readline() == f"{word}\n"
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, stderr


def test_interrupt_while_modules_load_is_not_caught(tmp_path):
    assert interrupt(tmp_path, Path("rich", "__init__.py"), SLOW_MODULE, "loading") == (130, "Interrupted.\n")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_interrupt_while_the_command_runs(tmp_path, body):
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
    command = [sys.executable, "-m", "scripts.figures", "worked_example"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: seen\n")
