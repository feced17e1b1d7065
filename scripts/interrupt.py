"""Ctrl-C in a program of this repository: one line and exit status 130, also while its modules still load.

A program imports this before anything else, since JAX takes seconds to load. It does nothing to whoever imports a
program as a module, such as a test.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

INTERRUPTED = 130
"""The exit status that shells give to what SIGINT ended."""

_SCRIPTS = Path(__file__).resolve().parent


def guard() -> None:
    """From now on SIGINT ends this process with a line where nothing else catches it."""
    sys.excepthook = _report
    sys.unraisablehook = _report_unraisable
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell's `&` has it ignored
        signal.signal(signal.SIGINT, _on_interrupt)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt once `main` is there; a module that loads may catch it, or wrap it in its own error."""
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    _leave()


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _leave()
    sys.__excepthook__(kind, error, traceback)


def _report_unraisable(args: "sys.UnraisableHookArgs") -> None:
    if issubclass(args.exc_type, KeyboardInterrupt):  # in a callback of the garbage collector, as JAX has one
        _leave()
    sys.__unraisablehook__(args)


def _leave() -> None:
    """End at once: threads of JAX would wait for each other."""
    after = b"\n" if os.isatty(2) else b""  # the ^C that a terminal shows
    os.write(2, after + b"Interrupted.\n")
    try:
        sys.stdout.flush()
    finally:
        os._exit(INTERRUPTED)


def _is_ours(program: str | None) -> bool:
    """Whether the file that Python was started with lies in this repository as a program does."""
    return program is not None and Path(program).resolve().parent in (_SCRIPTS, _SCRIPTS.parent)


if _is_ours(getattr(sys.modules["__main__"], "__file__", None)):
    guard()
