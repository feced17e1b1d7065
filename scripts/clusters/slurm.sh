#!/usr/bin/env bash
# Train on a SLURM cluster, and go on by itself after a preemption, the end of the time limit or a dead node.
#
#   sbatch scripts/clusters/slurm.sh \
#       --config=configs/gpu_8xh100_7b.py --config.mesh.sp=16 --config.run_dir=/shared/runs/7b
#
# Submit it from the repository, in an environment that has the project installed. Everything after the script's name
# goes to train.py; options before it override the ones below, as in `sbatch --nodes=4 scripts/clusters/slurm.sh ...`.
# The folder of the run must be one that every node sees. docs/pods.md explains the rest.
#
#SBATCH --job-name=ring_attention
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# One process for each GPU. For one process on each node: sbatch --ntasks-per-node=1. Never --gpus-per-task: it hides a
# node's other GPUs from a process, and JAX then looks for GPU number SLURM_LOCALID among those that are left.
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# SIGTERM to the processes (not to this script: that would be B:TERM) when 120 to 180 s of the time limit are left.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 2

# A job that was started again this often, for whatever reason, stops at its next failure. SIGTERM is not one.
max_restarts=${MAX_RESTARTS:-50}

# JAX gives a process under SLURM one GPU unless it is told otherwise.
if [[ ${SLURM_NTASKS_PER_NODE:-} == 1 ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node} - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# The processes talk to each other by gRPC, which would send that through a proxy.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
# Of a GPU's memory JAX takes three quarters by itself; scripts/plan.py counts on this much.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export PYTHONUNBUFFERED=1

# When one process ends, the others get 120 s to notice (train.py takes at most 60), to say so and to stop.
srun --label --cpu-bind=none --kill-on-bad-exit=0 --wait=120 python train.py "$@"
status=$? # the highest of all processes'; 128 + N where signal N ended one

restart() {
  echo "slurm.sh: status $status: the job goes back to the queue, and on from its newest checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
  exit
}

case $status in
  0) exit 0 ;;
  143) restart ;; # stopped by SIGTERM, everything is saved
  # A mistake in flags, config or data; Ctrl-C; SLURM's own status for out of memory. The same would happen again.
  2 | 130 | 253) exit "$status" ;;
  *) # failed, or a process was killed
    if ((${SLURM_RESTART_COUNT:-0} < max_restarts)); then restart; fi
    exit "$status"
    ;;
esac
