"""Train a Transformer on sequences that are sharded across devices.

`python train.py --help` says more. The code is in ring_attention/commands/train.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("train.py", COMMANDS["train"])())
