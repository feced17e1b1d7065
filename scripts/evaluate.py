"""Measure whether a trained model uses its context.

`python scripts/evaluate.py --help` says more. The code is in ring_attention/commands/evaluate.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("evaluate.py", COMMANDS["evaluate"])())
