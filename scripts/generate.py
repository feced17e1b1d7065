"""Continue prompts with a trained model, over one device or many.

`python scripts/generate.py --help` says more. The code is in ring_attention/commands/generate.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("generate.py", COMMANDS["generate"])())
