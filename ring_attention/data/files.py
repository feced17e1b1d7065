"""The files that documents come from: plain text and JSON lines, either of them gzipped.

A file is read and checked in full before a run reads it, so that a bad line stops a run in its first seconds and not in
its third hour. What stays in memory is a table, 28 bytes for each document, that `index.py` keeps for the next start;
texts are read again on access, and a checksum tells if they have changed meanwhile. Gzip cannot be entered in the
middle, so the texts of gzipped JSON lines are unpacked into a file once, a `Spool`.
"""

import array
import codecs
import dataclasses
import hashlib
import zlib

import numpy as np

from ring_attention.checks import printable
from ring_attention.data.bad_documents import BadDocumentError, LeaveOut, Reason
from ring_attention.data.config import DataConfig
from ring_attention.data.json_lines import holds_json_lines, read_documents, text_of_line
from ring_attention.data.reading import Line, Spool, is_gzipped, read_pieces, read_span
from ring_attention.data.utf8 import BOM, decode, refuse_json_lines, refuse_nul, refuse_other_formats, too_long

DOCUMENT = np.dtype([("begin", "<u8"), ("length", "<u4"), ("number", "<u4"), ("checksum", "<u4"), ("name_hash", "<u8")])
"""What is kept of a document: where its bytes stand in its file or spool, its line's number (0 for a whole file), their
checksum, and the hash of its name that decides whether it is held out."""


@dataclasses.dataclass(frozen=True)
class DocumentFile:
    """The documents of one file, by number.

    Attributes:
      path: the file.
      name: what the file is called, wherever it lies.
      text_field: the field of a JSON line that holds the text.
      table: DOCUMENT [documents].
      spool: the file's texts, unpacked; None for files that are read where they are.
    """

    path: str
    name: str
    text_field: str
    table: np.ndarray
    spool: Spool | None = None

    def __len__(self) -> int:
        return len(self.table)

    def document_name(self, index: int) -> str:
        """Return what the document is called: the file's name, and the line's number if a line is a document."""
        return _document_name(self.name, int(self.table["number"][index]))

    def text(self, index: int) -> bytes:
        """Read the document's text, UTF-8 and not empty; raises BadDocumentError if it has changed."""
        begin, length, number, checksum, _ = self.table[index].tolist()
        where = f"{printable(self.path)}:{number}" if number else printable(self.path)
        if self.spool:
            return _unchanged(self.spool.read(begin, length), checksum, printable(self.spool.path))
        if number:
            line = _unchanged(read_span(self.path, begin, begin + length), checksum, where)
            return text_of_line(Line(number, begin, line), where, self.text_field)
        return _unchanged(_read_text(self.path, begin + length), checksum, where)[begin:]

    def digest(self, chosen: np.ndarray) -> bytes:
        """Hash the names, lengths and contents of the documents `chosen`, int [n], in that order."""
        hashed = hashlib.blake2b(self.name.encode(errors="surrogateescape"), digest_size=16)
        for column in ("number", "length", "checksum"):
            hashed.update(self.table[column][chosen].tobytes())
        return hashed.digest()


class PartOfFile:
    """The documents of a file, of one of which only a part is left."""

    def __init__(self, file: DocumentFile, index: int, part: slice):
        self._file, self._index, self._part = file, index, part
        self.table = file.table

    def __len__(self) -> int:
        return len(self._file)

    def document_name(self, index: int) -> str:
        """Return what the document is called, and after it which of its bytes are left."""
        part = f"[{self._part.start}:{self._part.stop}]" if index == self._index else ""
        return self._file.document_name(index) + part

    def text(self, index: int) -> bytes:
        """Read what is left of the document."""
        text = self._file.text(index)
        return text[self._part] if index == self._index else text

    def digest(self, chosen: np.ndarray) -> bytes:
        """Hash what the file's documents hash to, and the part."""
        return self._file.digest(chosen) + f"{self._index}[{self._part.start}:{self._part.stop}]".encode()


def examine_file(path: str, name: str, config: DataConfig, leave_out: LeaveOut, spool: Spool | None) -> np.ndarray:
    """Read and check the file at `path`, and return the table of its documents, DOCUMENT [documents].

    Files whose names end as in `json_lines.NAMES`, and *.json that prove to be such, hold one document a line, in the
    field `config.text_field`; any other file is one document. Blank lines are no documents. `leave_out` is told of
    lines that cannot be used; for a file that cannot be used, or not be read to its end, BadDocumentError is raised.
    The texts of gzipped lines are added to `spool`.
    """
    if not holds_json_lines(path):
        return np.array([(*_examine_text(path, config), name_hash(name))], DOCUMENT)
    columns = {column: array.array("Q" if DOCUMENT[column].itemsize == 8 else "I") for column in DOCUMENT.names}
    for line, text in read_documents(path, config, leave_out):
        begin, content = (spool.append(text), text) if spool else (line.begin, line.content)
        row = (begin, len(content), line.number, zlib.crc32(content), name_hash(_document_name(name, line.number)))
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    table = np.empty(len(columns["begin"]), DOCUMENT)
    for column, values in columns.items():
        table[column] = np.frombuffer(values, values.typecode) if values else ()
    return table


def needs_spool(path: str) -> bool:
    """Return whether the texts of a file must be unpacked before they can be read in any order."""
    return is_gzipped(path) and holds_json_lines(path)


def name_hash(name: str) -> int:
    """Map a name to a number below 2**64, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def _document_name(name: str, number: int) -> str:
    return f"{name}:{number}" if number else name


def _examine_text(path: str, config: DataConfig) -> tuple[int, int, int, int]:
    """Return (begin, length, 0, checksum of all bytes) of a text file; raises BadDocumentError if it is unusable."""
    where, limit = printable(path), config.max_document_bytes
    decoder, end, begin, checksum = codecs.getincrementaldecoder("utf-8")(), 0, 0, 0
    for piece in read_pieces(path):
        if not end:
            begin = len(BOM) if piece.startswith(BOM) else 0
            refuse_other_formats(piece[:16], where)
            refuse_json_lines(piece, where, config.text_field)
        if end + len(piece) - begin > limit:
            raise too_long(where, limit)
        refuse_nul(piece, where, end)
        decode(piece, where, end, decoder)
        end, checksum = end + len(piece), zlib.crc32(piece, checksum)
    decode(b"", where, end, decoder)
    if end == begin:
        raise BadDocumentError(Reason.EMPTY, f"{where} is empty", "leave it out of the globs")
    return begin, end - begin, 0, checksum


def _read_text(path: str, length: int) -> bytes:
    """Read a file, or a little more than `length` bytes of it if it is longer."""
    text = bytearray()
    for piece in read_pieces(path):
        text += piece
        if len(text) > length:
            break
    return bytes(text)


def _unchanged(content: bytes, checksum: int, where: str) -> bytes:
    """Return `content` if it has the checksum that it had when the file was opened, else raise BadDocumentError."""
    found = zlib.crc32(content)
    if found == checksum:
        return content
    problem = f"{where} has changed since it was opened (checksum {found:08x}, need {checksum:08x})"
    remedy = "leave the data alone while a run reads them; start it again, after touching the file if its time is kept"
    raise BadDocumentError(Reason.UNREADABLE, problem, remedy)
