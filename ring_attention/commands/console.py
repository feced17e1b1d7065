"""The command `ring-attention`, which has all others as subcommands."""

from ring_attention.commands.program import Command, choose

COMMANDS = {
    "train": Command("ring_attention.commands.train", "train a model on sequences sharded across devices", trains=True),
    "plan": Command("ring_attention.commands.plan", "say whether a config fits a pod, and which strategy to take"),
    "doctor": Command("ring_attention.commands.doctor", "measure the devices at hand, and say what is off"),
    "generate": Command("ring_attention.commands.generate", "continue prompts with a trained model"),
    "evaluate": Command("ring_attention.commands.evaluate", "measure whether a trained model uses its context"),
    "finetune": Command(
        "ring_attention.commands.finetune", "fine-tune a Hugging Face checkpoint on documents", trains=True
    ),
    "import": Command("ring_attention.commands.import_hf", "read a Hugging Face checkpoint into a run folder"),
    "export": Command("ring_attention.commands.export_hf", "write a Hugging Face checkpoint"),
    "make_retrieval_data": Command(
        "ring_attention.commands.make_retrieval_data", "write documents that teach a model to retrieve"
    ),
    "make_small_hf": Command(
        "ring_attention.commands.make_small_hf", "write a small Hugging Face checkpoint with random weights"
    ),
}


def main() -> int:
    """Run the subcommand that the command line names, and return its exit status."""
    return choose("ring-attention", COMMANDS)()
