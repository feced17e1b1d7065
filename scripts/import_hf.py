"""Import a Hugging Face checkpoint of a family in docs/long_context.md, from a local folder of safetensors files.

`python scripts/import_hf.py --help` says more. The code is in ring_attention/commands/import_hf.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("import_hf.py", COMMANDS["import"])())
