"""Processes that look after each other, so that none waits for one that is gone.

A collective does not return when a process that takes part in it is gone, and on TPU and GPU not even an error comes.
So each process tells the others that it is alive, through the key-value store of JAX's coordination service, and reads
what they tell. One that ends with an error says so with its last words; one that falls silent (killed, out of memory,
its machine gone) is noticed after PATIENCE. The others then end, too, and say why: a scheduler can start all of them
again, and the run goes on from its newest checkpoint.

The service lives in process 0. When that one is gone, JAX aborts the others at once; the last line that they print is
ours.
"""

import ctypes
import hashlib
import json
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax._src import distributed  # the store has no public name; orbax takes it from here, too

from ring_attention.checks import ConfigError, shown
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import config_to_dict
from ring_attention.training.fault_tolerance.errors import (
    ERROR,
    FAILED,
    Preempted,
    exit_now,
    exit_status_and_line,
    is_expected,
)

BEAT = 2.0
"""Seconds between signs of life."""

PATIENCE = 20.0
"""Seconds of silence after which a process counts as gone."""

_FOLDER = "ring_attention/alive"

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")
"""Packages whose versions decide what is computed or read."""

SETTINGS = (
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion"),
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
)
"""JAX's settings that the environment of one machine may have changed."""

_ASK_MS = 2000
"""Milliseconds that the store is asked at a time; between them Ctrl-C is heard."""

_FIELDS_SHOWN = 5


class Peers:
    """Watches the other processes of a run, as a context manager; does nothing where there are none.

    When an exception leaves the block, the others get to hear its `exit_status_and_line`, and end as well.
    """

    def __init__(self):
        runtime = distributed.global_state
        self._client = runtime.client if runtime.num_processes > 1 else None
        self._me, self._count = runtime.process_id, runtime.num_processes
        self._seen: dict[int, tuple[str, float]] = {}
        self._done = threading.Event()

    def __enter__(self) -> "Peers":
        if self._client:
            self._explain_aborts(distributed.global_state.coordinator_address)
            self._tell({"beat": 0})
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._client and _failed_together(error):
            # A collective failed: most likely because a peer is gone, so let `_watch` find out which, and end this.
            self._done.wait(PATIENCE + 3 * BEAT)
        self._done.set()
        if not self._client:
            return
        if error is None or isinstance(error, Preempted):  # the others are stopping by themselves
            self._tell({"finished": True})
            return
        status, line = exit_status_and_line(error)
        self._tell({"status": status, "line": line})
        if self._me == 0:
            time.sleep(3 * BEAT)  # the store goes with this process

    def disconnect(self) -> None:
        """Leave the other processes for good, when all have done what they do together; what follows may take any time.

        At the end of a process JAX waits five minutes for the others, and then ends all of them.
        """
        if self._client:
            self._tell({"finished": True})
            self._done.set()
            self._thread.join()
            self._client = None
            jax.distributed.shutdown()

    def _tell(self, words: dict) -> None:
        self._client.key_value_set(f"{_FOLDER}/{self._me}", json.dumps(words), allow_overwrite=True)

    def _watch(self) -> None:
        """Say that this process is alive and listen to the others, until one of them is gone."""
        beat, start = 0, time.monotonic()
        while not self._done.wait(BEAT):
            beat += 1
            try:
                self._tell({"beat": beat})
                told = dict(self._client.key_value_dir_get(_FOLDER))
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone; JAX will end this process
            now = time.monotonic()
            for peer in range(self._count):
                words = told.get(f"{_FOLDER}/{peer}", '{"beat": -1}')
                if words != self._seen.get(peer, ("", start))[0]:
                    self._seen[peer] = words, now
                self._judge(peer, json.loads(words), now - self._seen[peer][1])

    def _judge(self, peer: int, words: dict, silent: float) -> None:
        """End this process if `peer` has ended with an error or has been silent for too long."""
        if peer == self._me or "finished" in words or self._done.is_set():
            return
        if "line" in words:
            line = words["line"].removeprefix(ERROR)
            _end(words["status"], f"process {peer} of {self._count} has stopped: {line}")
        if silent > PATIENCE:
            _end(FAILED, self._gone(peer, silent))

    def _gone(self, peer: int, silent: float) -> str:
        return (
            f"process {peer} of {self._count} has not been heard of for {silent:.0f} s and counts as gone, so this one "
            "stops; start all of them again, the run goes on from its newest checkpoint"
        )

    def _explain_aborts(self, coordinator_address: str) -> None:
        """Print a line and exit with FAILED where JAX is about to abort this process because another is gone.

        JAX has no hook for it in Python, and a handler of `signal` would not run any more, hence one in C.
        """
        host, _, port = coordinator_address.rpartition(":")

        def on_abort(_signal: int) -> None:
            now = time.monotonic()
            for peer, (words, since) in self._seen.items():
                if peer != self._me and "finished" not in words and now - since > 3 * BEAT:
                    _end(FAILED, self._gone(peer, now - since))
            try:
                socket.create_connection((host, int(port)), timeout=2).close()
            except OSError:
                _end(FAILED, self._gone(0, now - self._seen.get(0, ("", now))[1]))

        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)  # kept, for C does not
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(self._on_abort, ctypes.c_void_p))


def _failed_together(error: BaseException | None) -> bool:
    """Return whether `error` may come from what processes do together: from JAX's runtime, or an unknown place."""
    if error is None:
        return False
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    from_runtime = any(isinstance(link, jax.errors.JaxRuntimeError) or "Gloo" in str(link) for link in chain)
    return from_runtime or not is_expected(error)


def _end(status: int, line: str) -> None:
    print(f"{ERROR}{line}", file=sys.stderr)
    exit_now(status)


def require_agreement(topic: str, fields: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError unless `fields` are those of process 0; every process calls it alike. Alone, nothing happens.

    Args:
      topic: what is compared, one call each.
      fields: name -> value, fit for JSON.
      remedy: what to do about a difference.
    """
    runtime = distributed.global_state
    if runtime.num_processes in (None, 1):
        return
    if runtime.process_id == 0:
        runtime.client.key_value_set(f"ring_attention/agreement/{topic}", json.dumps(fields))
        return
    theirs = json.loads(_wait_for(f"ring_attention/agreement/{topic}"))
    ours = json.loads(json.dumps(fields))
    differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if not differing:
        return
    name, *others = differing
    more = f" (and {', '.join(others[:_FIELDS_SHOWN])}{' ...' if others[_FIELDS_SHOWN:] else ''})" if others else ""
    raise ConfigError(
        f"{name}={shown(ours.get(name))}{more}: so in process {runtime.process_id}, and in process 0 it is "
        f"{shown(theirs.get(name))}; {remedy}"
    )


def program_fields(config: TrainConfig) -> dict[str, Any]:
    """Return the resolved config, field by field, and the versions of what runs it."""
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    settings = {name: str(jax.config.values.get(name)) for name in SETTINGS}
    fields = flatten_dict(config_to_dict(config), sep=".")
    return (
        fields
        | {f"version of {name}": words for name, words in versions.items()}
        | settings
        | {"digest of ring_attention's source": source_digest()}
    )


def source_digest() -> str:
    """Hash this package's own source: two checkouts may share a version."""
    root, hashed = Path(__file__).parents[2], hashlib.blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        hashed.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return hashed.hexdigest()


def _wait_for(key: str) -> str:
    """Return what process 0 writes under `key`; `Peers` ends this process if that one is gone."""
    while True:
        try:
            return distributed.global_state.client.blocking_key_value_get(key, _ASK_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
