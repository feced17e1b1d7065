"""Prints how much memory loading a checkpoint took beyond the arrays, in bytes; `test_hf_memory` starts it.

python tests/hf_memory.py SMALL_FOLDER FOLDER streamed|at_once
"""

import json
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import ring_attention as ra  # noqa: E402
from ring_attention.models.hf import source as source_module  # noqa: E402
from ring_attention.models.hf.loading import load_parameters  # noqa: E402


def memory(field):
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[field].split()[0]) * 1024


def read_all_first(folder):
    """The control: every tensor is in memory before the first is placed."""
    tensors = {name: x for path in sorted(folder.path.glob("*.safetensors")) for name, x in load_file(path).items()}

    class Reading:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            return lambda slices: tensors[self.name][slices]

        def __exit__(self, *error):
            pass

    source_module.Source.reading = lambda self, name: Reading(name)


def main(small, folder, how):
    mesh = ra.make_mesh(sp=4, tp=2)
    jax.block_until_ready(
        load_parameters(source_module.open_source(small), mesh)
    )  # what JAX itself takes is not counted
    source = source_module.open_source(folder)
    before = memory("VmRSS")
    if how == "at_once":
        read_all_first(source)
    params = load_parameters(source, mesh)
    arrays = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = max(int(np.prod(stored.shape)) * 4 for stored in source.stored.values())
    beyond = memory("VmHWM") - before - arrays
    print(json.dumps(dict(beyond=beyond, arrays=arrays, largest=largest)))


if __name__ == "__main__":
    main(*sys.argv[1:])
