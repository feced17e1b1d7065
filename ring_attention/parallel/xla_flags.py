"""Which flags the XLA that is installed knows: it ends the process at one that it does not, and releases drop flags."""

import functools
import mmap
from pathlib import Path

import jaxlib


@functools.cache
def knows_flag(name: str) -> bool:
    """Whether the flag `name`, without dashes, is one of jaxlib's.

    A flag's name stands in the library as a C string of its own, which takes 40 ms to look for; XLA cannot be
    asked before a backend starts. Where nothing can be read the answer is no: to leave a flag out harms least.
    """
    wanted = b"\0" + name.encode() + b"\0"
    libraries = sorted(Path(jaxlib.__file__).parent.glob("*.so"), key=lambda path: -path.stat().st_size)
    return any(_holds(path, wanted) for path in libraries)


def _holds(path: Path, text: bytes) -> bool:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            return library.find(text) >= 0
    except (OSError, ValueError):  # ValueError: an empty file, which is not mapped
        return False
