"""How tests run the commands: in a process of their own, or in this one, which does not load JAX again."""

import os
import subprocess
import sys
from pathlib import Path

from ring_attention.commands import program

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
