"""What makes bytes a text: UTF-8 without NUL bytes, and no other format under a text's name."""

import codecs
import json
import re

from ring_attention.data.bad_documents import BadDocumentError, Reason

BOM = codecs.BOM_UTF8

_TO_UTF8 = "convert it (iconv -t UTF-8) or leave it out of the globs"
_WIDE = {codecs.BOM_UTF32_LE: 32, codecs.BOM_UTF32_BE: 32, codecs.BOM_UTF16_LE: 16, codecs.BOM_UTF16_BE: 16}
_ARCHIVES = {
    "gzip": rb"\x1f\x8b\x08",
    "zstd": rb"[\x50-\x5f]\x2a\x4d\x18|\x28\xb5\x2f\xfd",
    "bzip2": rb"BZh[1-9]\x31\x41\x59\x26\x53\x59",
    "xz": rb"\xfd7zXZ\x00",
    "lz4": rb"\x04\x22\x4d\x18",
    "zip": rb"PK\x03\x04",
    "Parquet": rb"PAR1\x15",
    "Arrow": rb"ARROW1\x00",
}


def refuse_other_formats(head: bytes, where: str) -> None:
    """Raise BadDocumentError if a file that begins with `head`, after decompression, is an archive or in UTF-16."""
    for mark, bits in _WIDE.items():
        if head.startswith(mark):
            problem = f"{where} is in UTF-{bits}, as its byte order mark says, not in UTF-8"
            remedy = f"convert it (iconv -f UTF-{bits} -t UTF-8) or leave it out of the globs"
            raise BadDocumentError(Reason.NOT_UTF8, problem, remedy)
    for archive, pattern in _ARCHIVES.items():
        if re.match(pattern, head):
            problem = f"{where} is in the format of {archive}, of which no text is read"
            remedy = "unpack it; of archives only gzip is read, under a name that ends in .gz"
            raise BadDocumentError(Reason.FORMAT, problem, remedy)


def refuse_json_lines(head: bytes, where: str, text_field: str) -> None:
    """Raise BadDocumentError if the text that begins with `head` looks like JSON lines, whatever it is called."""
    first, _, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    if not first.startswith(b"{"):
        return
    try:
        fields = json.loads(first)
    except (ValueError, RecursionError):
        return
    if text_field in fields or rest.lstrip().startswith(b"{"):
        problem = f"{where} holds JSON lines, and its name does not say so"
        raise BadDocumentError(Reason.FORMAT, problem, "call it *.jsonl, or *.jsonl.gz if it is gzipped")


def decode(content: bytes, where: str, begin: int, decoder: codecs.IncrementalDecoder | None = None) -> str:
    """Decode what begins at byte `begin` of a file; without `decoder` it must end where a character ends.

    An empty `content` ends what was given to the decoder before. Raises BadDocumentError for what is not UTF-8.
    """
    try:
        return content.decode() if decoder is None else decoder.decode(content, final=not content)
    except UnicodeDecodeError as error:
        carried = len(error.object) - len(content)  # a character that the piece before began
        problem = f"{where} is not valid UTF-8 at byte offset {begin - carried + error.start}"
        raise BadDocumentError(Reason.NOT_UTF8, problem, _TO_UTF8) from error


def refuse_nul(content: bytes, where: str, begin: int) -> None:
    """Raise BadDocumentError for a NUL byte: no text has one, though it is valid UTF-8."""
    found = content.find(0)
    if found >= 0:
        problem = f"{where} holds a NUL byte at byte offset {begin + found}, so it is binary"
        remedy = "leave it out of the globs, or convert it if it is text in UTF-16 (iconv -f UTF-16 -t UTF-8)"
        raise BadDocumentError(Reason.BINARY, problem, remedy)


def too_long(where: str, limit: int) -> BadDocumentError:
    """Return the error for a document of more than `limit` bytes."""
    problem, remedy = f"{where} has more than {limit:,} bytes", "split it, or raise the bound if the memory allows it"
    return BadDocumentError(Reason.TOO_LONG, problem, remedy, "max_document_bytes")
