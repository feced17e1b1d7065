"""JSON lines: an object a line, one of whose fields is a document's text."""

import json
from collections.abc import Iterator

from ring_attention.checks import printable, shown
from ring_attention.data.bad_documents import BadDocumentError, LeaveOut, Reason
from ring_attention.data.config import DataConfig
from ring_attention.data.reading import Line, read_lines
from ring_attention.data.utf8 import BOM, decode, refuse_nul, refuse_other_formats, too_long

NAMES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
"""How the names of such files end, in small or capital letters, without the ".gz" of those that are gzipped."""

PERHAPS = ".json"
"""The end of names that other JSON has too; the first line tells."""


def holds_json_lines(path: str) -> bool:
    """Return whether the file's name says that it holds JSON lines, or may hold them."""
    return path.lower().removesuffix(".gz").endswith((*NAMES, PERHAPS))


def read_documents(path: str, config: DataConfig, leave_out: LeaveOut) -> Iterator[tuple[Line, bytes]]:
    """Yield each line that is a document, and its text; `leave_out` is told of each that cannot be used.

    Raises BadDocumentError if the file is not JSON lines at all, or cannot be read to its end.
    """
    first = True
    for line in read_lines(path, config.max_document_bytes):
        if first and line.content is not None:
            refuse_other_formats(line.content[:16] if line.begin == 0 else b"", printable(path))
            if path.lower().removesuffix(".gz").endswith(PERHAPS):
                _refuse_one_document(line.content, printable(path))
        first, where = False, f"{printable(path)}:{line.number}"
        try:
            if line.content is None:
                raise too_long(where, config.max_document_bytes)
            text = text_of_line(line, where, config.text_field)
        except BadDocumentError as bad:
            leave_out(bad)
        else:
            yield line, text


def text_of_line(line: Line, where: str, text_field: str) -> bytes:
    """Return the text in field `text_field` of the JSON object that a line holds; raises BadDocumentError."""
    refuse_nul(line.content, where, line.begin)
    text = _field_of(_parse(line, where), where, text_field)
    if not text:
        raise BadDocumentError(Reason.EMPTY, f"{where} has an empty text", "leave the line out")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"{where} escapes half a surrogate pair at character {error.start} of its text"
        raise BadDocumentError(Reason.HALF_A_CHARACTER, problem, "repair that line") from error


def _refuse_one_document(first_line: bytes, where: str) -> None:
    """Raise BadDocumentError if the first line of a *.json file begins an array, or an object that goes on after it."""
    first_line = first_line.removeprefix(BOM).strip()
    try:
        json.loads(first_line)
        goes_on = False
    except json.JSONDecodeError as error:
        goes_on = error.pos >= len(error.doc)
    except (ValueError, RecursionError):
        goes_on = False  # is told of the line
    if goes_on or first_line.startswith(b"["):
        problem = f"{where} is one JSON document, not JSON lines"
        remedy = "write an object a line (jq -c '.[]' makes them of an array), or leave it out of the globs"
        raise BadDocumentError(Reason.NOT_JSON, problem, remedy)


def _parse(line: Line, where: str) -> dict:
    """Return the JSON object that a line holds; raises BadDocumentError for any other line."""
    try:
        content = line.content.removeprefix(BOM)  # files that are strung together have marks in the middle
        begin = line.begin + len(line.content) - len(content)
        fields = json.loads(decode(content, where, begin).rstrip("\r\n"))
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
    """Return the string in the field; raises BadDocumentError if there is none."""
    if text_field not in fields:
        problem = f"{where} has only the fields {shown(sorted(fields))}"
        raise BadDocumentError(Reason.WITHOUT_FIELD, problem, "name the one that holds text", "text_field")
    text = fields[text_field]
    if not isinstance(text, str):
        problem = f"{where} holds a {type(text).__name__} there, not a string"
        remedy = f"name one of the fields {shown(sorted(fields))} that holds text"
        raise BadDocumentError(Reason.NOT_TEXT, problem, remedy, "text_field")
    return text
