"""Make a small Hugging Face checkpoint with random weights, to try the other scripts without a download.

`python scripts/make_small_hf.py --help` says more. The code is in ring_attention/commands/make_small_hf.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("make_small_hf.py", COMMANDS["make_small_hf"])())
