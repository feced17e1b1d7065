"""Export a model to a folder that transformers loads: an import, or a run of train.py.

`python scripts/export_hf.py --help` says more. The code is in ring_attention/commands/export_hf.py.
"""

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import start

if __name__ == "__main__":
    start("export_hf.py", COMMANDS["export"])
