"""Fine-tune a Hugging Face checkpoint on your own documents: from its folder to another that transformers loads.

`python scripts/finetune.py --help` says more. The code is in ring_attention/commands/finetune.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("finetune.py", COMMANDS["finetune"])())
