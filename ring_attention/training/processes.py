"""One run on many processes: JAX's multi-controller runtime, found in the cluster's environment or told by flags."""

import dataclasses
import os

import jax
from jax._src import clusters, distributed  # neither what it found nor whether it would has a public name
from jax.sharding import Mesh

from ring_attention.checks import ConfigError, one_line, require_field
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.rendezvous import meet

HEARTBEAT_SECONDS = 60
"""After so long without a heartbeat JAX's own coordination service ends a run; `peers.py` is quicker and says more."""

JOIN_SECONDS = 50
"""Seconds that processes wait for each other where flags say who is who: what is amiss is said within a minute."""

_ALONE = {"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"}
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessFlags:
    """Which process this is, where no cluster says it; None where the flag was not given.

    Attributes:
      coordinator_address: host:port at which process 0 listens.
      num_processes: how many processes the run has.
      process_id: the number of this process, from 0.
      join_timeout: seconds to wait for the others; 50 by default.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout: int | None = None

    def __post_init__(self):
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if not given:
            return
        needed = ("coordinator_address", "num_processes", "process_id")
        missing = [f"--{name}" for name in needed if name not in given]
        name = next(iter(given))
        together = "the three flags go together, or none where the cluster says who is who"
        require_field(not missing, f"--{name}", given[name], f"{' and '.join(missing)} missing", together)
        host, _, port = self.coordinator_address.rpartition(":")
        require_field(
            bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
            "--coordinator_address",
            self.coordinator_address,
            "must be host:port",
            "write it like --coordinator_address=10.0.0.1:8476, the same on every process",
        )
        require_field(
            self.num_processes > 0, "--num_processes", self.num_processes, "must be positive", "give 1 or more"
        )
        require_field(
            0 <= self.process_id < self.num_processes,
            "--process_id",
            self.process_id,
            f"must lie in [0, {self.num_processes})",
            "number the processes from 0",
        )
        timeout = self.join_timeout
        require_field(timeout is None or timeout > 0, "--join_timeout", timeout, "must be positive", "give seconds")


def join_processes(flags: ProcessFlags) -> int:
    """Join the other processes of this run, if there are any, and return how many they are with this one.

    Call it before anything that touches a device.

    With flags, those decide. Without, the environment does: SLURM (srun), Open MPI, GKE and Cloud TPU are recognised by
    JAX. Waits for the others: as long as the flags say, or up to five minutes in a cluster.

    Raises:
      ConfigError: if JAX has started already, the environment speaks of a cluster and not of this process's place, the
        coordinator's port is another program's, or two processes have one number.
      RunError: if the others cannot be reached.
    """
    if flags.num_processes == 1 or (flags.num_processes is None and not _in_cluster()):
        return 1
    try:
        if flags.num_processes is None:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        else:
            who = {"num_processes": flags.num_processes, "process_id": flags.process_id}
            meet(flags.coordinator_address, **who, seconds=flags.join_timeout or JOIN_SECONDS)
            loopback = flags.coordinator_address.rpartition(":")[0] in _LOOPBACK
            jax.distributed.initialize(
                flags.coordinator_address,
                **who,
                cluster_detection_method="deactivate",
                coordinator_bind_address=flags.coordinator_address if loopback else None,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except jax.errors.JaxRuntimeError as error:
        where = flags.coordinator_address or "the first process of the cluster"
        raise RunError(
            f"cannot join the other processes at {where} ({str(error).splitlines()[0][:200]}); see that all of them "
            "were started, with the same --coordinator_address and --num_processes, and that its port is free"
        ) from error
    except ConfigError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:  # what the environment says of a cluster may not fit together
        got = one_line(error)[:300]
        remedy = "mend the environment, or say who is who with --coordinator_address, --num_processes and --process_id"
        raise ConfigError(f"cannot join the other processes: {got}; {remedy}") from error
    return distributed.global_state.num_processes  # jax.process_count() would start the devices


def compile_anew_where_needed(mesh: Mesh) -> None:
    """Switch JAX's compilation cache off for CPU devices of several processes.

    What comes back from it no longer keeps its collectives in order (jaxlib 0.10.2), and gloo, which tells them apart
    by their order alone, then mixes them up and aborts. One process, and accelerators, are not affected.
    """
    if mesh.devices.flat[0].platform == "cpu" and jax.process_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)


def _in_cluster() -> bool:
    """Return whether there are others, and `jax.distributed.initialize` would find out by itself who they are."""
    alone = any(os.environ.get(name) == size for name, size in _ALONE.items())
    automatic = [env for env in clusters.ClusterEnv._cluster_types if not env.opt_in_only_method]
    return not alone and any(env.is_env_present() for env in automatic)


def is_first() -> bool:
    """Return whether this is the process that writes and prints for all."""
    return jax.process_index() == 0
