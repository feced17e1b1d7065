"""`python -m ring_attention` is the command `ring-attention`."""

import sys

from ring_attention.commands.console import main

if __name__ == "__main__":
    sys.exit(main())
