"""Measure whether a trained model uses its context.

`python scripts/evaluate.py --help` says more. The code is in ring_attention/commands/evaluate.py.
"""

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import start

if __name__ == "__main__":
    start("evaluate.py", COMMANDS["evaluate"])
