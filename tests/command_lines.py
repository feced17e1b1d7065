"""How tests run the commands: in a process of their own, or in this one, which does not load JAX again."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

from ring_attention.commands import console, program

REPOSITORY = Path(__file__).parents[1]


def words_of(name):
    """The words that run a command: "plan.py", "train.py" or "verify accuracy"."""
    if name.endswith(".py"):
        return [sys.executable, str(REPOSITORY / (name if name == "train.py" else f"scripts/{name}"))]
    folder, command = name.split()
    return [sys.executable, "-m", f"scripts.{folder}", command]


def run_command(name, *flags, timeout=300, cwd=REPOSITORY, **environment):
    """The finished process of a command, with what it printed as text."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"} | environment
    command = [*words_of(name), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def call_command(name, main, *flags):
    """The exit status of a command that runs in this process."""
    argv, sys.argv = sys.argv, [*sys.argv]
    try:
        return program.run(name, main, [*map(str, flags)])
    except SystemExit as error:  # argparse
        return error.code or 0
    finally:
        sys.argv = argv


def run_here(name, *flags):
    """What `run_command` returns, of a command that runs in this process; names are those of `words_of`."""
    if name.endswith(".py"):
        command = console.COMMANDS[name.removesuffix(".py")]
    else:
        folder, short = name.split()
        name, command = (
            f"python -m scripts.{name}",
            importlib.import_module(f"scripts.{folder}.__main__").COMMANDS[short],
        )
    main = importlib.import_module(command.module).main
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = call_command(name, main, *flags)
    return subprocess.CompletedProcess([name, *flags], status, out.getvalue(), err.getvalue())
