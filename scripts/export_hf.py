"""Export a model to a folder that transformers loads: an import, or a run of train.py.

`python scripts/export_hf.py --help` says more. The code is in ring_attention/commands/export_hf.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("export_hf.py", COMMANDS["export"])())
