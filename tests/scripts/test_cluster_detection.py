"""Processes that know of each other from what srun and mpirun set alone, as docs/pods.md says of JAX."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

JOIN = """
import jax
from ring_attention.training.processes import ProcessFlags, join_processes
count = join_processes(ProcessFlags())
print(jax.process_index(), count, jax.process_count(), jax.config._read("jax_cuda_visible_devices"))
jax.distributed.shutdown()
"""

# What srun and mpirun set for process I of two on one machine.
ENVIRONMENTS = {
    "SLURM": {
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "I",
        "SLURM_LOCALID": "I",
    },
    "Open MPI 4": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "I",
        "OMPI_COMM_WORLD_LOCAL_RANK": "I",
    },
}


def join(variables, port):
    """Two processes that join each other by what their environment says; what each prints."""
    common = {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port)}
    processes = []
    for me in "01":
        env = os.environ | common | {name: value.replace("I", me) for name, value in variables.items()}
        processes.append(subprocess.Popen([sys.executable, "-c", JOIN], env=env, stdout=subprocess.PIPE, text=True))
    try:
        return [process.communicate(timeout=240)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("cluster", ENVIRONMENTS)
def test_cluster_processes_find_each_other_without_flags(cluster, free_port):
    assert join(ENVIRONMENTS[cluster], free_port) == [["0", "2", "2", "0"], ["1", "2", "2", "1"]]


def test_lone_process_of_a_node_gets_all_its_gpus(free_port):
    variables = ENVIRONMENTS["SLURM"] | {"SLURM_LOCALID": "0", "JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}
    assert join(variables, free_port) == [["0", "2", "2", "0,1,2,3"], ["1", "2", "2", "0,1,2,3"]]
