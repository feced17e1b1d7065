"""What the C library does with memory that a step gave back."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # names and numbers of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep memory that is freed; returns whether its C library can (glibc).

    XLA's CPU client allocates a step's working memory anew at each step. By default glibc gives so large a block back
    to the system, which clears and maps every page of it again at the next step: 2 to 4% of its time
    (docs/benchmarks.md). Call it before JAX starts its threads. The process then stays as large as it once was.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1})  # one heap, which only grows


def return_freed_memory() -> bool:
    """Undo `keep_freed_memory`, for a process whose steps turn out to run elsewhere."""
    return _set({_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 128 * 1024, _M_ARENA_MAX: 0})  # glibc's defaults


def _set(options: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all([mallopt(option, value) == 1 for option, value in options.items()])
