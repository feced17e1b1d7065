"""Does a config fit a pod, what will it wait for, and which strategy should it take? Before anything is rented.

`python scripts/plan.py --help` says more. The code is in ring_attention/commands/plan.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("plan.py", COMMANDS["plan"])())
