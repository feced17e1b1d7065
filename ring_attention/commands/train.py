"""Train a Transformer on sequences that are sharded across devices.

python train.py                                  trains the CPU demo, configs/cpu_demo.py
python train.py --config=configs/NAME.py --config.model.num_layers=4 --config.mesh.sp=8
python train.py --help                           every config and every field
"""

from ring_attention.commands.program import invocation
from ring_attention.evaluation.report import report
from ring_attention.training.flags import parse_config, parse_processes
from ring_attention.training.run import open_run, train

DEFAULT_CONFIG = "cpu_demo"


def main(argv: list[str]) -> None:
    """Read the config, train, and report."""
    process_flags, argv = parse_processes(argv)
    with open_run(parse_config(argv, DEFAULT_CONFIG, program=invocation("train")), process_flags) as opened:
        report(opened, train(opened))
