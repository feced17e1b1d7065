"""Files in pieces of bounded size, so that neither an endless line nor an archive that swells fills the memory.

The texts of an archive, which cannot be entered in the middle, are unpacked into a `Spool`.
"""

import gzip
import os
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ring_attention.checks import ConfigError, printable
from ring_attention.data.bad_documents import BadDocumentError, Reason

PIECE = 2**20
"""Bytes read at once."""

READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file can raise, gzipped or not."""


class Line(NamedTuple):
    """A line of a file.

    Attributes:
      number: its number in the file, from 1.
      begin: byte offset of its first byte, after decompression.
      content: its bytes, line break included; None if they are more than the limit.
    """

    number: int
    begin: int
    content: bytes | None


def read_pieces(path: str) -> Iterator[bytes]:
    """Yield the file's bytes, decompressed if its name ends in ".gz" or ".GZ", PIECE at a time.

    Raises BadDocumentError if it cannot be read to its end.
    """
    try:
        with _open(path) as file:
            while piece := file.read(PIECE):
                yield piece
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def read_lines(path: str, limit: int) -> Iterator[Line]:
    """Yield each line that is not blank; of one that is longer than `limit` bytes only so many are read at once.

    Raises BadDocumentError if the file cannot be read to its end.
    """
    number, begin = 0, 0
    try:
        with _open(path) as file:
            while pieces := _read_line(file, limit):
                number, length = number + 1, sum(map(len, pieces))
                if length > limit and not pieces[-1].endswith(b"\n"):
                    pieces.clear()
                    yield Line(number, begin, None)
                    length += _skip_line(file)
                elif any(piece.strip() for piece in pieces):
                    yield Line(number, begin, b"".join(pieces))
                begin += length
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def read_span(path: str, begin: int, end: int) -> bytes:
    """Read the bytes from `begin` to `end` of a file that is not compressed, fewer where it ends before."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            return file.read(end - begin)
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> BadDocumentError:
    """Say that a file cannot be read, and what the system or the decompressor has against it."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    problem = f"{printable(path)} cannot be read ({reason})"
    return BadDocumentError(Reason.UNREADABLE, problem, "repair it or leave it out of the globs")


def is_gzipped(path: str) -> bool:
    """Return whether the file's name says that it is gzipped."""
    return path.lower().endswith(".gz")


class Spool:
    """The texts of an archive, unpacked into a file on disk, one after the other, to be read in any order.

    One that has a path is read by it, so that thousands of archives need no more open files than one; its writer calls
    `close` and gives it its lasting name afterwards. One without is a nameless file below $TMPDIR that vanishes with
    the process, however that ends.
    """

    def __init__(self, path: Path | None = None, *, writable: bool = False):
        self.path = str(path or tempfile.gettempdir())
        self._is_nameless, self._file, self._end = path is None, None, 0
        if self._is_nameless or writable:
            self._file = self._attempt(lambda: open(path, "wb") if path else tempfile.TemporaryFile())  # noqa: SIM115
            weakref.finalize(self, self._file.close)

    def append(self, text: bytes) -> int:
        """Write a text and return where it begins; raises ConfigError if the disk is full."""
        begin = self._end
        self._attempt(lambda: self._write(text))
        self._end += len(text)
        return begin

    def flush(self) -> None:
        """Make what was written readable."""
        self._attempt(self._file.flush)

    def close(self) -> int:
        """Finish writing and return the number of bytes."""
        self._attempt(self._file.close)
        return self._end

    def read(self, begin: int, length: int) -> bytes:
        """Read the text of `length` bytes at `begin`; raises BadDocumentError if the file is gone."""
        if self._is_nameless:
            return os.pread(self._file.fileno(), length, begin)
        return read_span(self.path, begin, begin + length)

    def _write(self, text: bytes) -> None:
        self._file.write(text)

    def _attempt(self, write):
        try:
            return write()
        except OSError as error:
            place = "the folder of data.index_dir" if not self._is_nameless else "$TMPDIR"
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigError(
                f"data.index_dir: {printable(self.path)} cannot be written ({reason}), and the texts of gzipped JSON "
                f"lines have to be unpacked there; choose {place} with room for as many bytes as they have unpacked"
            ) from error


def _open(path: str):
    return gzip.open(path, "rb") if is_gzipped(path) else open(path, "rb")


def _read_line(file, limit: int) -> list[bytes]:
    """Read to the next line break, or to the end, or a byte more than `limit`, in pieces; [] at the end."""
    pieces, room = [], limit + 1
    while room and (piece := file.readline(min(PIECE, room))):
        pieces.append(piece)
        room -= len(piece)
        if piece.endswith(b"\n"):
            break
    return pieces


def _skip_line(file) -> int:
    """Read to the next line break, or to the end, and return the number of bytes."""
    skipped = 0
    while piece := file.readline(PIECE):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
