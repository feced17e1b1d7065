"""Draw and print what the documents show: `python -m scripts.figures NAME`; without a name it lists what there is."""

import sys

from ring_attention.commands.program import Command, choose

COMMANDS = {
    name: Command(f"scripts.figures.{name}", words)
    for name, words in {
        "balance": "how evenly each layout shares the work of a ring",
        "documents": "what packed documents and unequal devices cost a ring, and what dealing gains, simulated",
        "ring": "how blocks travel around a ring of four devices",
        "simulate_ring": "step times on devices that are not alike, simulated",
        "worked_example": "what a naive broadcast costs, and what is really sent",
    }.items()
}

if __name__ == "__main__":
    sys.exit(choose("python -m scripts.figures", COMMANDS)())
