"""Train a Transformer on sequences that are sharded across devices.

`python train.py --help` says more. The code is in ring_attention/commands/train.py.
"""

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import start

if __name__ == "__main__":
    start("train.py", COMMANDS["train"])
