"""Check what the documents claim: `python -m scripts.verify NAME`; without a name it lists what there is."""

import sys

from ring_attention.commands.program import Command, choose

COMMANDS = {
    name: Command(f"scripts.verify.{name}", words)
    for name, words in {
        "advice": "whether the commands that the planner advises compile within memory",
        "accuracy": "errors of ring attention against float64, beside dense attention's",
        "memory": "the memory of a device for rings of 16 to 512, compiled for TPU pods",
        "pods": "whether transfers lie beside computation, in programs compiled for pods",
        "prediction": "the planner's memory beside the compiler's",
        "programs": "transfers, bytes, largest array and memory of compiled rings",
        "ranking": "the planner's order beside published comparisons",
        "records": "the longest contexts that others trained, beside those predicted here and compiled",
        "soak": "train while processes are killed and files damaged; every loss must stay",
        "times": "the planner's seconds beside those that were published and measured",
        "table3": "the longest contexts of the Ring Attention paper's Table 3, compiled",
    }.items()
}
COMMANDS["soak"] = COMMANDS["soak"]._replace(module="scripts.verify.soak.command")

if __name__ == "__main__":
    sys.exit(choose("python -m scripts.verify", COMMANDS)())
