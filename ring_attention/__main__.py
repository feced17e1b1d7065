"""`python -m ring_attention` is the command `ring-attention`."""

from ring_attention.commands.console import main

if __name__ == "__main__":
    main()
