"""Does a config fit a pod, what will it wait for, and which strategy should it take? Before anything is rented.

`python scripts/plan.py --help` says more. The code is in ring_attention/commands/plan.py.
"""

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import start

if __name__ == "__main__":
    start("plan.py", COMMANDS["plan"])
