"""Texts in a file on disk, one after the other, to be read in any order."""

import os
import tempfile
import weakref
from pathlib import Path

from ring_attention.checks import ConfigError, printable
from ring_attention.data.reading import read_span


class Spool:
    """The texts of an archive, unpacked; as large as they are.

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
