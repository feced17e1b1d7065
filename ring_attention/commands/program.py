"""How each command of this project starts and ends: Ctrl-C, one line for an error, the exit status.

JAX takes seconds to load, so this module imports nothing but the standard library, and a command's own module is
imported after Ctrl-C is taken care of.
"""

import functools
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import NamedTuple, NoReturn

Main = Callable[[list[str]], int | None]
"""Takes the words after the command's name. Returns the exit status, None for 0, or raises what went wrong."""

INTERRUPTED = 130
"""The exit status that shells give to what SIGINT ended."""


class Command(NamedTuple):
    """A module whose `main(argv)` is a command, and what it is for in one line.

    `trains` says that an interrupted command goes on from its newest checkpoint when it is started again.
    """

    module: str
    words: str
    trains: bool = False


def choose(program: str, commands: Mapping[str, Command]) -> Callable[[], int]:
    """Load the command that the first word of the command line names, as `load` does."""
    _guard()
    name, *rest = sys.argv[1:] or [""]
    if name in commands:
        return load(f"{program} {name}", commands[name], rest)
    width = max(map(len, commands))
    lines = [f"  {command:{width}}  {about.words}" for command, about in commands.items()]
    if name in ("-h", "--help"):
        print("\n".join([f"usage: {program} COMMAND [flags, see {program} COMMAND --help]", "", *lines]))
        sys.exit(0)
    wrong = f"{ascii(name[:80])} is not a command" if name else "no command is given"
    print(f"{program}: error: {wrong}; choose one of {', '.join(commands)}", file=sys.stderr)
    sys.exit(2)


def load(program: str, command: Command, argv: list[str] | None = None) -> Callable[[], int]:
    """Import a command's module while Ctrl-C ends the process in one line.

    Args:
      program: the name of the command in its messages.
      command: which one.
      argv: the words after the name; by default those of this process.

    Returns:
      a function without arguments that runs the command and returns its exit status (`run`).
    """
    _guard()
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING)
    try:
        importlib.import_module("ring_attention.checks").require_train("this command")
        main = importlib.import_module(command.module).main
    except ModuleNotFoundError as error:  # the first of the two says how to install what is missing
        if error.name is not None:
            raise
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    from ring_attention.training.fault_tolerance.errors import exit_now

    return functools.partial(run, program, main, argv, trains=command.trains, leave=exit_now)


def run(
    program: str,
    main: Main,
    argv: list[str],
    *,
    trains: bool = False,
    leave: Callable[[int], object] = lambda status: None,
) -> int:
    """Return the exit status of `main(argv)`, after one line on stderr that says why it is not 0.

    An error that nobody foresaw has its traceback before the line. `leave(status)` is called for all that fails, and
    may end the process at once: other processes of a run may never come to the end where JAX would wait for them.
    """
    from ring_attention.training.fault_tolerance.errors import (
        ERROR,
        FINISHED,
        Preempted,
        exit_status_and_line,
        is_expected,
    )

    sys.argv[0] = program  # where argparse finds the name
    try:
        return main(argv) or FINISHED
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and not trains:  # whoever read the output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FINISHED
        if not is_expected(error):
            traceback.print_exc()
        status, line = exit_status_and_line(error)
        if isinstance(error, KeyboardInterrupt) and not trains:
            line = "Interrupted."
        if line.startswith(ERROR):
            line = f"{program}: error: {line.removeprefix(ERROR)}"
        print(line, file=sys.stderr)
        if not isinstance(error, Preempted):
            leave(status)
        return status


def invocation(command: str) -> str:
    """Return how a person writes another command who wrote this one so: `python train.py` or `ring-attention train`."""
    if sys.argv[0].startswith("ring-attention"):
        return f"ring-attention {command}"
    return "python train.py" if command == "train" else f"python scripts/{command}.py"


def _guard() -> None:
    """Let SIGINT end this process with one line, also while modules load."""
    sys.excepthook = _report
    sys.unraisablehook = _report_unraisable
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell's `&` has it ignored
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End at once: a module that loads may catch KeyboardInterrupt, or wrap it in its own error."""
    _leave()


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _leave()
    sys.__excepthook__(kind, error, trace)


def _report_unraisable(args: "sys.UnraisableHookArgs") -> None:
    if issubclass(args.exc_type, KeyboardInterrupt):  # in a callback of the garbage collector, as JAX has one
        _leave()
    sys.__unraisablehook__(args)


def _leave() -> NoReturn:
    """End the process now: threads of JAX would wait for each other."""
    after = b"\n" if os.isatty(2) else b""  # the ^C that a terminal shows
    os.write(2, after + b"Interrupted.\n")
    try:
        sys.stdout.flush()
    finally:
        os._exit(INTERRUPTED)
