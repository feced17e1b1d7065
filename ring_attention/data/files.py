"""The files that documents come from: plain text and JSON lines, either of them gzipped.

A file is read and checked in full when it is opened, so that a bad line stops a run in its first seconds and not in its
third hour. What stays in memory afterwards is an index; texts are read again on access, and a checksum tells if they
have changed meanwhile. The one exception is gzipped JSON lines: gzip cannot be entered in the middle, so their texts
are held in memory.
"""

import array
import codecs
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from ring_attention.checks import printable, shown
from ring_attention.data.bad import BadDocumentError, Reason
from ring_attention.data.config import DataConfig
from ring_attention.data.reading import Line, read_lines, read_pieces, read_span

LeaveOut = Callable[[BadDocumentError], None]
"""Is told of each document that cannot be used: it counts it, or raises."""


class DocumentFile(Protocol):
    """The documents of one file, by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what the document is called: the file's name, and the line's number if a line is a document."""

    def text(self, index: int) -> bytes:
        """Read the document's text, UTF-8 and not empty; raises BadDocumentError if it has changed."""


def open_document_file(path: str, name: str, config: DataConfig, leave_out: LeaveOut) -> DocumentFile:
    """Open the file at `path` and check all of it.

    `*.jsonl` and `*.jsonl.gz` hold one document a line, in the field `config.text_field`; any other file is one
    document. Blank lines are no documents. `leave_out` is told of lines that cannot be used; for a file that cannot be
    used, or not be read to its end, BadDocumentError is raised.
    """
    if path.endswith((".jsonl", ".jsonl.gz")):
        kind = GzippedJsonLinesFile if path.endswith(".gz") else JsonLinesFile
        return kind(path, name, config, leave_out)
    return TextFile(path, name, config)


class TextFile:
    """A file that is one document."""

    def __init__(self, path: str, name: str, config: DataConfig):
        self._path, self._name = path, name
        self._length, self._checksum = _examine(path, config.max_document_bytes)

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        """Return what document `index` is called."""
        return self._name

    def text(self, index: int) -> bytes:
        """Read the text of document `index`."""
        text = bytearray()
        for piece in read_pieces(self._path):
            text += piece
            if len(text) > self._length:
                break
        return _unchanged(bytes(text), self._checksum, printable(self._path))


class JsonLinesFile:
    """A file of JSON objects, one a line, reached through the byte offsets of its lines."""

    def __init__(self, path: str, name: str, config: DataConfig, leave_out: LeaveOut):
        self._path, self._name, self._text_field = path, name, config.text_field
        index = array.array("q")  # 32 bytes a line: begin, end, line number, checksum
        for line, _ in _documents(path, config, leave_out):
            index.extend((line.begin, line.begin + len(line.content), line.number, zlib.crc32(line.content)))
        self._index = np.array(index, np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        """Return what document `index` is called."""
        return f"{self._name}:{self._index[index, 2]}"

    def text(self, index: int) -> bytes:
        """Read the text of document `index`."""
        begin, end, number, checksum = self._index[index].tolist()
        where = f"{printable(self._path)}:{number}"
        content = _unchanged(read_span(self._path, begin, end), checksum, where)
        return _text_of_line(Line(number, begin, content), where, self._text_field)


class GzippedJsonLinesFile:
    """A gzipped file of JSON objects, one a line; its texts are held in memory."""

    def __init__(self, path: str, name: str, config: DataConfig, leave_out: LeaveOut):
        self._name = name
        self._texts = [(line.number, text) for line, text in _documents(path, config, leave_out)]

    def __len__(self) -> int:
        return len(self._texts)

    def name(self, index: int) -> str:
        """Return what document `index` is called."""
        return f"{self._name}:{self._texts[index][0]}"

    def text(self, index: int) -> bytes:
        """Read the text of document `index`."""
        return self._texts[index][1]


def _examine(path: str, limit: int) -> tuple[int, int]:
    """Return (length, checksum) of a text file; raises BadDocumentError unless it is one to read."""
    where, decoder, length, checksum = printable(path), codecs.getincrementaldecoder("utf-8")(), 0, 0
    for piece in read_pieces(path):
        if length + len(piece) > limit:
            raise _too_long(where, limit)
        _refuse_nul(piece, where, length)
        _decode(piece, where, length, decoder)
        length, checksum = length + len(piece), zlib.crc32(piece, checksum)
    _decode(b"", where, length, decoder)
    if not length:
        raise BadDocumentError(Reason.EMPTY, f"{where} is empty", "leave it out of the globs")
    return length, checksum


def _documents(path: str, config: DataConfig, leave_out: LeaveOut) -> Iterator[tuple[Line, bytes]]:
    """Yield each line of a JSONL file that is a document, and its text."""
    for line in read_lines(path, config.max_document_bytes):
        where = f"{printable(path)}:{line.number}"
        try:
            if line.content is None:
                raise _too_long(where, config.max_document_bytes)
            text = _text_of_line(line, where, config.text_field)
        except BadDocumentError as bad:
            leave_out(bad)
        else:
            yield line, text


def _text_of_line(line: Line, where: str, text_field: str) -> bytes:
    """The text in field `text_field` of the JSON object that a line holds; raises BadDocumentError."""
    _refuse_nul(line.content, where, line.begin)
    text = _field_of(_parse(line, where), where, text_field)
    if not text:
        raise BadDocumentError(Reason.EMPTY, f"{where} has an empty text", "leave the line out")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"{where} escapes half a surrogate pair at character {error.start} of its text"
        raise BadDocumentError(Reason.HALF_A_CHARACTER, problem, "repair that line") from error


def _parse(line: Line, where: str) -> dict:
    """The JSON object that a line holds; raises BadDocumentError for any other line."""
    try:
        fields = json.loads(_decode(line.content, where, line.begin).rstrip("\r\n"))
    except json.JSONDecodeError as error:
        problem = f"is not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    except RecursionError:
        problem = "is not JSON that can be read (nested too deeply)"
    except ValueError:  # Python reads no integer of more than 4300 digits
        problem = "is not JSON that can be read (a number has too many digits)"
    else:
        if isinstance(fields, dict):
            return fields
        problem = f"holds a {type(fields).__name__}, not an object"
        raise BadDocumentError(Reason.NOT_JSON, f"{where} {problem}", 'write {"text": "..."} a line')
    raise BadDocumentError(Reason.NOT_JSON, f"{where} {problem}", "repair that line") from None


def _field_of(fields: dict, where: str, text_field: str) -> str:
    """The string in the field; raises BadDocumentError if there is none."""
    if text_field not in fields:
        problem = f"{where} has only the fields {shown(sorted(fields))}"
        raise BadDocumentError(Reason.WITHOUT_FIELD, problem, "name the one that holds text", "text_field")
    text = fields[text_field]
    if not isinstance(text, str):
        problem = f"{where} holds a {type(text).__name__} there, not a string"
        remedy = f"name one of the fields {shown(sorted(fields))} that holds text"
        raise BadDocumentError(Reason.NOT_TEXT, problem, remedy, "text_field")
    return text


def _decode(content: bytes, where: str, begin: int, decoder: codecs.IncrementalDecoder | None = None) -> str:
    """Decode what begins at byte `begin` of a file; without `decoder` it must end where a character ends.

    An empty `content` ends what was given to the decoder before.
    """
    try:
        return content.decode() if decoder is None else decoder.decode(content, final=not content)
    except UnicodeDecodeError as error:
        carried = len(error.object) - len(content)  # a character that the piece before began
        problem = f"{where} is not valid UTF-8 at byte offset {begin - carried + error.start}"
        remedy = "convert it (iconv -t UTF-8) or leave it out of the globs"
        raise BadDocumentError(Reason.NOT_UTF8, problem, remedy) from error


def _refuse_nul(content: bytes, where: str, begin: int) -> None:
    """Raise BadDocumentError for a NUL byte: no text has one, though it is valid UTF-8."""
    found = content.find(0)
    if found >= 0:
        problem = f"{where} holds a NUL byte at byte offset {begin + found}, so it is binary"
        remedy = "leave it out of the globs, or convert it if it is text in UTF-16 (iconv -f UTF-16 -t UTF-8)"
        raise BadDocumentError(Reason.BINARY, problem, remedy)


def _too_long(where: str, limit: int) -> BadDocumentError:
    problem, remedy = f"{where} has more than {limit:,} bytes", "split it, or raise the bound if the memory allows it"
    return BadDocumentError(Reason.TOO_LONG, problem, remedy, "max_document_bytes")


def _unchanged(content: bytes, checksum: int, where: str) -> bytes:
    """Return `content` if it has the checksum that it had when the file was opened, else raise BadDocumentError."""
    found = zlib.crc32(content)
    if found == checksum:
        return content
    problem = f"{where} has changed since it was opened (checksum {found:08x}, need {checksum:08x})"
    raise BadDocumentError(Reason.UNREADABLE, problem, "leave the data alone while a run reads them; start it again")
