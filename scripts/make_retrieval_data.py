"""Write documents that teach a model to retrieve: filler with hidden needles, and a question about one at the end.

`python scripts/make_retrieval_data.py --help` says more. The code is in ring_attention/commands/make_retrieval_data.py.
"""

import sys

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import load

if __name__ == "__main__":
    sys.exit(load("make_retrieval_data.py", COMMANDS["make_retrieval_data"])())
