"""Measure the devices at hand, and say what is off.

`python scripts/doctor.py --help` says more. The code is in ring_attention/commands/doctor.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("doctor.py", COMMANDS["doctor"])())
