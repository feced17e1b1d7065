"""The files that documents come from: plain text and JSON lines, either of them gzipped.

A file is read and checked in full when it is opened, so that a bad line stops a run in its first seconds and not in its
third hour. What stays in memory afterwards is an index; texts are read again on access. The one exception is gzipped
JSON lines: gzip cannot be entered in the middle, so their texts are held in memory.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np


class UnusableFileError(Exception):
    """A file that cannot give documents: what is wrong, what to do, and which field of DataConfig is to blame."""

    def __init__(self, problem: str, remedy: str, field: str = "paths"):
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy, self.field = problem, remedy, field


class NotUtf8Error(UnusableFileError):
    """A file whose bytes are not UTF-8."""

    def __init__(self, path: str, offset: int):
        super().__init__(
            f"{path} is not valid UTF-8 at byte offset {offset}",
            "convert it (iconv -t UTF-8) or leave it out of the globs",
        )


class DocumentFile(Protocol):
    """The non-empty documents of one file, by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what the document is called: the file's name, and the line's number if a line is a document."""

    def text(self, index: int) -> bytes:
        """Read the document's text, UTF-8."""


def open_document_file(path: str, name: str, text_field: str) -> DocumentFile:
    """Open the file at `path`; raises UnusableFileError if any of its documents cannot be read.

    `*.jsonl` and `*.jsonl.gz` hold one document a line, in the field `text_field`; any other file is one document.
    Empty documents and blank lines are left out.
    """
    if path.endswith(".jsonl"):
        return JsonLinesFile(path, name, text_field)
    if path.endswith(".jsonl.gz"):
        return GzippedJsonLinesFile(path, name, text_field)
    return TextFile(path, name)


class TextFile:
    """A file that is one document, or none if it is empty."""

    def __init__(self, path: str, name: str):
        self._path, self._name = path, name
        text = _read(path)
        _decode(text, path, 0)
        self._length = 1 if text else 0

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """Return what document `index` is called."""
        return self._name

    def text(self, index: int) -> bytes:
        """Read the text of document `index`."""
        return _read(self._path)


class JsonLinesFile:
    """A file of JSON objects, one a line, reached through the byte offsets of its lines."""

    def __init__(self, path: str, name: str, text_field: str):
        self._path, self._name, self._text_field = path, name, text_field
        spans = [
            (begin, begin + len(line), number)
            for number, begin, line in _lines(path)
            if _text_of_line(line, path, number, begin, text_field)
        ]
        self._spans = np.array(spans, np.int64).reshape(-1, 3)  # 24 bytes a line: begin, end, line number

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        """Return what document `index` is called."""
        return f"{self._name}:{self._spans[index, 2]}"

    def text(self, index: int) -> bytes:
        """Read the text of document `index`."""
        begin, end, number = (int(x) for x in self._spans[index])
        with open(self._path, "rb") as file:
            file.seek(begin)
            line = file.read(end - begin)
        return _text_of_line(line, self._path, number, begin, self._text_field)


class GzippedJsonLinesFile:
    """A gzipped file of JSON objects, one a line; its texts are held in memory."""

    def __init__(self, path: str, name: str, text_field: str):
        self._name = name
        texts = ((number, _text_of_line(line, path, number, begin, text_field)) for number, begin, line in _lines(path))
        self._texts = [(number, text) for number, text in texts if text]

    def __len__(self) -> int:
        return len(self._texts)

    def name(self, index: int) -> str:
        """Return what document `index` is called."""
        return f"{self._name}:{self._texts[index][0]}"

    def text(self, index: int) -> bytes:
        """Read the text of document `index`."""
        return self._texts[index][1]


def _open(path: str):
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _read(path: str) -> bytes:
    try:
        with _open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, byte offset, line) for each line that is not blank."""
    begin = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, begin, line
                begin += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> UnusableFileError:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return UnusableFileError(f"{path} cannot be read ({reason})", "repair it or leave it out of the globs")


def _decode(text: bytes, path: str, begin: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8Error(path, begin + error.start) from error


def _text_of_line(line: bytes, path: str, number: int, begin: int, text_field: str) -> bytes:
    """Parse line `number`, which starts at byte `begin`: the text in field `text_field` of its JSON object."""
    where = f"{path}:{number}"
    try:
        fields = json.loads(_decode(line, path, begin))
    except json.JSONDecodeError as error:
        raise UnusableFileError(
            f"{where} is not JSON ({error.msg} at column {error.colno})", "repair that line"
        ) from error
    if not isinstance(fields, dict):
        raise UnusableFileError(
            f"{where} holds a {type(fields).__name__}, not an object", 'write {"text": "..."} a line'
        )
    if text_field not in fields:
        problem = f"{where} has only the fields {sorted(fields)}"
        raise UnusableFileError(problem, "name the one that holds text", "text_field")
    text = fields[text_field]
    if not isinstance(text, str):
        problem = f"{where} holds a {type(text).__name__} there, not a string"
        raise UnusableFileError(problem, f"name one of the fields {sorted(fields)} that holds text", "text_field")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"{where} escapes half a surrogate pair at character {error.start} of its text"
        raise UnusableFileError(problem, "repair that line") from error
