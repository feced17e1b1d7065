"""The processes of a run meet at the coordinator's address before JAX's runtime begins there.

JAX's coordination service ends in a segmentation fault where its port is taken, and its clients in a C++ stack after
minutes, or never. So process 0 first listens there itself: each other process says which one it is, a line of JSON,
and hears that it was understood and, once all have come, how it goes on.
"""

import contextlib
import errno
import json
import socket
import sys
import time

from ring_attention.checks import ConfigError
from ring_attention.training.fault_tolerance.errors import RunError

ANSWER_SECONDS = 5.0
"""Seconds within which process 0 answers whoever connects; another program that has the port does not."""

BIND_SECONDS = 10.0
"""Seconds that process 0 tries to have the port: the run before may still be ending."""

_TWICE = "--process_id={}: two processes have this number; give each its own"
_POLL = 0.2
_LONGEST = 4096
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def meet(address: str, *, num_processes: int, process_id: int, seconds: float) -> None:
    """Return when all processes of the run have called this, each with its own `process_id`.

    Args:
      address: host:port of process 0, where nobody listens yet.
      num_processes: how many processes the run has, the same for all.
      process_id: the number of this one, from 0.
      seconds: how long to wait for the others.

    Raises:
      ConfigError: if the port is another program's, two processes have one number, or they count themselves otherwise.
      RunError: if not all have come in time.
    """
    host, _, port = address.rpartition(":")
    place, deadline = (host.strip("[]"), int(port)), time.monotonic() + seconds
    hello = {"process_id": process_id, "num_processes": num_processes}
    if process_id:
        with _claim(place, hello) as claim:
            _report(place, hello, claim, deadline, seconds)
        return
    with _listen(place, hello, min(deadline, time.monotonic() + BIND_SECONDS)) as server:
        problem = _gather(server, num_processes, deadline, seconds)
    if problem:
        raise _error(problem)


def _listen(place: tuple[str, int], hello: dict, deadline: float) -> socket.socket:
    """Listen at the coordinator's port as JAX will: on all interfaces, but for an address of the loopback alone."""
    host, port = place
    while True:
        try:
            if host in _LOOPBACK:
                return socket.create_server(place, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                if problem := _ask(place, hello, time.monotonic() + ANSWER_SECONDS):  # another process 0 listens
                    raise _error(problem) from None
                reason = "another program listens at that port of this machine"
            else:
                reason = f"process 0 cannot listen there ({error.strerror})"
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ConfigError(f"--coordinator_address={host}:{port}: {reason}; give a port that is free") from None
        time.sleep(_POLL)


def _gather(server: socket.socket, num_processes: int, deadline: float, seconds: float) -> dict | None:
    """Hear the others out until all have come or one cannot be; tell all of them how it goes on, and return that."""
    with contextlib.ExitStack() as connections:
        heard: dict[int, socket.socket] = {}
        late: list[socket.socket] = []
        problem = None
        while problem is None and len(heard) < num_processes - 1:
            if time.monotonic() > deadline:
                problem = {"timeout": _incomplete(heard, num_processes, seconds)}
                break
            server.settimeout(_POLL)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nobody came, or no process of a run
                connection = connections.enter_context(server.accept()[0])
                hello = _read_line(connection, time.monotonic() + 1)
                number, count = int(hello["process_id"]), int(hello["num_processes"])
                _send(connection, {"heard": number})
                late.append(connection)
                if count != num_processes:
                    problem = {"mistake": _counted_otherwise(number, count, num_processes)}
                elif number == 0 or number in heard:
                    problem = {"mistake": _TWICE.format(number)}
                heard[number] = connection
        for connection in late:
            with contextlib.suppress(OSError):
                _send(connection, problem or {"go": True})
    return problem


def _incomplete(heard: dict, num_processes: int, seconds: float) -> str:
    missing = [number for number in range(1, num_processes) if number not in heard]
    named = ", ".join(map(str, missing[:8])) + (" ..." if missing[8:] else "")
    return (
        f"{len(missing)} of {num_processes} processes have not come within {seconds:g} s: number {named}; start all of "
        "them with the same --coordinator_address and --num_processes, or wait longer with --join_timeout=SECONDS"
    )


def _counted_otherwise(number: int, count: int, num_processes: int) -> str:
    return (
        f"--num_processes={count}: process {number} was told so, and process 0 {num_processes}; give all processes the "
        "same number"
    )


def _claim(place: tuple[str, int], hello: dict) -> socket.socket:
    """Open a socket that says that this process of a run is on this machine, until it is closed.

    Process 0 may never come to tell two that have one number; on one machine they can tell each other. Only Linux has
    such sockets, which need no file.
    """
    claim = socket.socket(socket.AF_UNIX)
    if sys.platform.startswith("linux"):
        name = f"\0ring_attention/{place}/{hello['process_id']}"
        try:
            claim.bind(name)
            claim.listen()
        except OSError:
            with contextlib.suppress(OSError):
                claim.connect(name)  # that one hears of it, and process 0, if it is there
            claim.close()
            _ask(place, hello, time.monotonic() + ANSWER_SECONDS)
            raise _error({"mistake": _TWICE.format(hello["process_id"])}) from None
    claim.setblocking(False)
    return claim


def _report(place: tuple[str, int], hello: dict, claim: socket.socket, deadline: float, seconds: float) -> None:
    """Tell process 0 that this one is here, as often as it takes, and wait for the others with it."""
    silent_since = None  # from when on something at the port took connections, and did not answer
    while True:
        started = time.monotonic()
        problem = _ask(place, hello, deadline + ANSWER_SECONDS)
        if problem == {"go": True}:
            return
        if problem:
            raise _error(problem)
        with contextlib.suppress(OSError):  # mostly: nobody has come
            claim.accept()[0].close()
            raise _error({"mistake": _TWICE.format(hello["process_id"])})
        silent_since = (silent_since or started) if _is_open(place) else silent_since
        silent = silent_since is not None and time.monotonic() - silent_since > BIND_SECONDS + ANSWER_SECONDS
        if silent or time.monotonic() > deadline:
            where = f"--coordinator_address={place[0]}:{place[1]}"
            if silent_since is not None:
                raise ConfigError(
                    f"{where}: something listens there and does not answer as process 0 of this run; another program "
                    "has the port, or the run has begun without this process: give a port that is free"
                )
            raise RunError(
                f"{where}: process 0 has not been there within {seconds:g} s; start it, with --process_id=0 at this "
                "address, or wait longer with --join_timeout=SECONDS"
            )
        time.sleep(max(0.0, started + _POLL - time.monotonic()))


def _ask(place: tuple[str, int], hello: dict, deadline: float) -> dict | None:
    """Return what process 0 answers in the end; None if nobody is there, or somebody else."""
    with contextlib.suppress(OSError, ValueError), socket.create_connection(place, timeout=2) as connection:
        _send(connection, hello)
        if _read_line(connection, time.monotonic() + ANSWER_SECONDS) == {"heard": hello["process_id"]}:
            return _read_line(connection, deadline)
    return None


def _is_open(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=2).close()
    except OSError:
        return False
    return True


def _error(problem: dict) -> Exception:
    return ConfigError(problem["mistake"]) if "mistake" in problem else RunError(problem["timeout"])


def _send(connection: socket.socket, words: dict) -> None:
    connection.sendall(json.dumps(words).encode() + b"\n")


def _read_line(connection: socket.socket, deadline: float) -> dict:
    """Return the object in a line of JSON; OSError or ValueError where none comes before the deadline."""
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        piece = connection.recv(1)  # what follows is for the next call
        line += piece
        if not piece or len(line) > _LONGEST:
            raise ValueError("not a line")
    words = json.loads(line)
    if not isinstance(words, dict):
        raise ValueError("not an object")
    return words
