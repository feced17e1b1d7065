"""Run train.py as several processes on this machine, for trying out on a laptop what a pod does.

  python scripts/launch_local.py --processes=4 -- --config=configs/tiny.py --config.mesh.sp=4

starts `python train.py --coordinator_address=127.0.0.1:PORT --num_processes=4 --process_id=I` four times, each with the
arguments after `--`. The processes run on CPU, and share out the simulated devices of the mesh. Each line that process
I prints begins with [I]; those in which gloo counts its connections are left out. SIGINT (Ctrl-C) and SIGTERM go to
every process, once.

When a process fails, the others have --grace seconds to stop by themselves; those that do not are killed. The exit
status is that of the process that failed first, 128 + N if signal N ended it. No process outlives the launcher; on
Linux not even if that is killed with SIGKILL.
"""

import argparse
import contextlib
import ctypes
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from ring_attention.checks import local_path
from ring_attention.commands.arguments import Parser
from ring_attention.commands.program import run

REPOSITORY = Path(__file__).resolve().parents[1]
FORWARDED = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent dies

# What gloo says of connections among CPU devices: hundreds of lines, which nothing switches off.
CHATTER = re.compile(rb"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. Expected number[a-z ]* is : \d+\n?")

Child = subprocess.Popen[bytes]


def main(argv: Sequence[str]) -> int:
    """Run the processes and return the exit status for all."""
    args = parse(argv)
    signals: list[int] = []  # that have arrived and not been passed on
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: signals.append(number))
    children: list[Child] = []
    try:
        start_all(args, children)
        threads = [thread for index, child in enumerate(children) for thread in relay(index, child)]
        status = wait_for_all(children, signals, args.grace)
        for thread in threads:
            thread.join(timeout=5)  # a grandchild may hold on to a pipe for ever
    finally:
        for child in children:
            end(child)
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `program_args` are the words after `--`."""
    ours, dashes, rest = list(argv), [], []
    if "--" in ours:
        place = ours.index("--")
        ours, dashes, rest = ours[:place], ours[place : place + 1], ours[place + 1 :]
    parser = Parser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument("--grace", type=float, default=60, help="seconds for others to stop (default: %(default)s)")
    parser.add_argument(
        "--program", type=local_path, default=REPOSITORY / "train.py", help="what to run; by default train.py"
    )
    args, strays = parser.parse_known_args(ours)
    if strays:
        hint = "" if dashes else ", so write -- before the arguments of the program"
        parser.error(f"{strays[0]} is not an argument of the launcher{hint}")
    if args.processes < 1:
        parser.error(f"--processes={args.processes} must be positive; 2 is the fewest that talk to each other")
    if not args.grace >= 0:
        parser.error(f"--grace={args.grace:g} must not be negative; 0 kills the others at once")
    if not args.program.is_file():
        parser.error(f"--program={args.program}: there is no such file; name a Python program")
    args.program_args = rest
    return args


def start_all(args: argparse.Namespace, children: list[Child]) -> None:
    """Start the processes and append them to `children`, so that those are known if a later one cannot be started."""
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}  # a pipe would get blocks of 8 KiB
    for index in range(args.processes):
        place = [f"--coordinator_address={address}", f"--num_processes={args.processes}", f"--process_id={index}"]
        child = subprocess.Popen(
            [sys.executable, args.program, *place, *args.program_args],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C would reach them twice: from the terminal and from here
            preexec_fn=die_with_parent(),
        )
        children.append(child)


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> Callable[[], None] | None:
    """Return what a child is to do first, so that the kernel kills it when this process ends for any reason."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # looked up here: between fork and exec little is safe

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(1)

    return ask_kernel


def relay(index: int, child: Child) -> list[threading.Thread]:
    """Print what `child` prints, each line behind [index], from threads that end with its output."""
    streams = ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
    copies = [functools.partial(copy_lines, source, sink, b"[%d] " % index) for source, sink in streams]
    threads = [threading.Thread(target=copy, daemon=True) for copy in copies]
    for thread in threads:
        thread.start()
    return threads


def copy_lines(source: BinaryIO, sink: BinaryIO, prefix: bytes) -> None:
    """Copy lines but CHATTER, whole even where several threads write to `sink`, until `source` ends."""
    # Closing `source` tells the child if nobody reads `sink` any more.
    with source, contextlib.suppress(BrokenPipeError):
        for line in source:
            kept = CHATTER.sub(b"", line)
            if kept:
                sink.write(prefix + kept.rstrip(b"\n") + b"\n")
                sink.flush()


def wait_for_all(children: list[Child], signals: list[int], grace: float) -> int:
    """Return the status of the first that failed, once all have ended; `grace` seconds after it, kill the rest."""
    running, status, deadline = dict(enumerate(children)), 0, None
    while running:
        time.sleep(POLL_SECONDS)
        while signals:
            number = signals.pop(0)
            for child in running.values():
                child.send_signal(number)
            deadline = deadline or time.monotonic() + grace
        for index, child in list(running.items()):
            if child.poll() is None:
                continue
            del running[index]
            if child.returncode and not status:
                status = exit_status(child)
                deadline = deadline or time.monotonic() + grace
                say(f"process {index} ended with {status}; the others have {grace:g} s to stop")
        if deadline and time.monotonic() > deadline:
            for index, child in running.items():
                say(f"process {index} has not stopped within {grace:g} s and is killed")
                end(child)
            deadline = None
    return status


def exit_status(child: Child) -> int:
    """Return what a shell would: the exit status, or 128 + N after signal N."""
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end(child: Child) -> None:
    """Kill `child` and what it has started, if it still runs."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def say(words: str) -> None:
    """Print a line of the launcher's own, if anybody reads it."""
    with contextlib.suppress(BrokenPipeError):
        print(f"[launcher] {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run("launch_local.py", main, sys.argv[1:]))
