"""Measure speed: `python -m scripts.benchmarks NAME`; without a name it lists what there is."""

import sys

from ring_attention.commands.program import Command, choose

COMMANDS = {
    name: Command(f"scripts.benchmarks.{name}", words)
    for name, words in {
        "attention": "ring attention beside the paper's code, JAX's and PyTorch's, on CPU devices",
        "decode": "attention of one new token to a cache",
        "documents": "packed documents in zigzag and dealt by their work: time, balance, bytes sent",
        "kernels": "how much of a kernel's speed is left in a ring, on one GPU",
        "loss": "the loss with its gradients, in three ways",
        "sharp": "gradients of sharp attention in 16 bits, and what they cost",
        "stragglers": "a ring of two processes, one on a core that it shares",
        "strategies": "every strategy on the same attention: memory, bytes, errors, time",
        "training": "steps of training beside PyTorch's with transformers",
    }.items()
}

if __name__ == "__main__":
    sys.exit(choose("python -m scripts.benchmarks", COMMANDS)())
