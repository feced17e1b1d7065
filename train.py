"""Train a Transformer on sequences that are sharded across devices.

python train.py                                  trains the CPU demo, configs/cpu_demo.py
python train.py --config=configs/NAME.py --config.model.num_layers=4 --config.mesh.sp=8
python train.py --help                           every config and every field
"""

from scripts import interrupt  # noqa: F401 - first, so that Ctrl-C is heard while the others load

# isort: split

import logging
import sys
import traceback

from ring_attention.evaluation.report import report
from ring_attention.training.fault_tolerance.errors import FINISHED, Preempted, is_expected, last_words, leave
from ring_attention.training.flags import parse_config, parse_processes
from ring_attention.training.run import open_run, train

DEFAULT_CONFIG = "configs/cpu_demo.py"


def main(argv: list[str]) -> None:
    """Read the config, train, and report."""
    process_flags, argv = parse_processes(argv)
    with open_run(parse_config(argv, DEFAULT_CONFIG), process_flags) as opened:
        report(opened, train(opened))


def run(argv: list[str]) -> int:
    """Run `main`; return the exit status, and say in a line on stderr why it is not 0."""
    try:
        main(argv)
        return FINISHED
    except (Exception, KeyboardInterrupt) as error:
        if not is_expected(error):
            traceback.print_exc()
        status, line = last_words(error)
        print(line, file=sys.stderr)
        if not isinstance(error, Preempted):  # the others may never come to the end where JAX would wait for them
            leave(status)
        return status


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(run(sys.argv[1:]))
