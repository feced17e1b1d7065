"""Documents with random access, and the split that keeps some of them away from training."""

import dataclasses
import functools
import glob
import hashlib
import operator
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ring_attention.checks import ConfigError, printable, require_field
from ring_attention.data.bad_documents import BadDocumentError, DataReport, Reason
from ring_attention.data.config import PYTHON_STDLIB, SKIP, DataConfig
from ring_attention.data.files import DOCUMENT, DocumentFile, PartOfFile, examine_file, needs_spool
from ring_attention.data.globs import matching_files
from ring_attention.data.index import DocumentIndex, Examined
from ring_attention.data.reading import Spool

LEAST_INDEXED = 16 * 2**20
"""Bytes of files from which on an index that nobody asked for is worth its place: smaller ones are read in a moment."""

# Third-party code differs from machine to machine; the standard library is the same for one Python version.
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, never empty, in UTF-8, and what it is called."""

    name: str
    text: bytes


class Documents(Protocol):
    """The documents of one file, by number, as `files.DocumentFile` has them."""

    table: np.ndarray

    def __len__(self) -> int: ...

    def document_name(self, index: int) -> str:
        """Return what the document is called."""

    def text(self, index: int) -> bytes:
        """Read the document's text, UTF-8 and not empty; raises BadDocumentError if it has changed."""

    def digest(self, chosen: np.ndarray) -> bytes:
        """Hash the names, lengths and contents of the documents `chosen`, int [n], in that order."""


class DocumentSource:
    """A sequence of documents, read on access; fits `grain.MapDataset.source`.

    Attributes:
      report: what was left out when the files were opened.
    """

    def __init__(self, files: Sequence[Documents], report: DataReport, chosen: np.ndarray | None = None):
        """Take the documents `chosen` of the files, int [documents], ascending; None takes all."""
        self._files, self.report = files, report
        self._ends = np.cumsum([len(file) for file in files], dtype=np.int64)  # of each file's documents
        smallest = np.min_scalar_type(int(self._ends[-1]))
        self._chosen = np.arange(self._ends[-1], dtype=smallest) if chosen is None else chosen.astype(smallest)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Document:
        """Read a document; raises ConfigError if its file is not what it was when it was opened."""
        file, place = self._place(operator.index(index))
        try:
            return Document(file.document_name(place), file.text(place))
        except BadDocumentError as error:
            raise ConfigError(f"data.{error.field}: {error}") from error

    def names(self) -> list[str]:
        """Name each document, without reading any."""
        return [file.document_name(place) for file, place in map(self._place, range(len(self)))]

    def where(self, chosen: np.ndarray) -> "DocumentSource":
        """Keep the documents for which `chosen`, bool [documents], holds, in the same order."""
        return DocumentSource(self._files, self.report, self._chosen[chosen])

    def digest(self) -> str:
        """Hash the documents' names, lengths and contents in their order, without reading any.

        A saved position is good where the digest is the same.
        """
        hashed = hashlib.blake2b(digest_size=16)
        for file, places in self._by_file():
            hashed.update(file.digest(places))
        return hashed.hexdigest()

    def column(self, name: str) -> np.ndarray:
        """Return a column of the documents' tables, [documents]; `name` is a field of `files.DOCUMENT`."""
        return np.concatenate([file.table[name][places] for file, places in self._by_file()])

    def with_part(self, index: int, part: slice, *, alone: bool) -> "DocumentSource":
        """Keep only the bytes `part` of document `index`, and with `alone` no other document."""
        files, (file, place) = list(self._files), self._place(index)
        files[files.index(file)] = PartOfFile(file, place, part)
        return DocumentSource(files, self.report, self._chosen[[index]] if alone else self._chosen)

    def _place(self, index: int) -> tuple[Documents, int]:
        """Return the file of a document, and the document's number in it."""
        number = int(self._chosen[index])
        file = int(np.searchsorted(self._ends, number, "right"))
        return self._files[file], number - int(self._ends[file]) + len(self._files[file])

    def _by_file(self) -> Iterator[tuple[Documents, np.ndarray]]:
        """Yield each file of which there are documents, and their numbers in it."""
        bounds = np.searchsorted(self._chosen, self._ends)
        begin = 0
        for file, end, bound in zip(self._files, self._ends.tolist(), bounds.tolist(), strict=True):
            if bound > begin:
                yield file, self._chosen[begin:bound].astype(np.int64) - (end - len(file))
            begin = bound


def open_documents(config: DataConfig, index_dir: Path | None = None) -> DocumentSource:
    """Open the documents that `config.paths` names, sorted by name.

    A document's name is its path below the fixed part of its glob ("/data/**/*.txt" names /data/a/b.txt "a/b.txt"), so
    that it survives a move to another machine, followed by ":line" in a file of JSON lines. A file that several globs
    match counts once. Every file is read and checked here, once; `files.py` says what stays in memory.

    What was found is kept in `config.index_dir`, or where that is empty in `index_dir` (for corpora of LEAST_INDEXED
    bytes and more), and a file whose size and time are the same is not read again. Without either, nothing is kept.

    Empty documents are left out, and of the standard library files that are deliberately no UTF-8 (test data for the
    parser). Others that cannot be used, for the reasons in `bad_documents.Reason`, are left out if
    `config.bad_documents` is "skip"; the source's `report` has counted all of them. An archive that is damaged is left
    out whole, since its checksum stands at its end. A document that is left out changes neither the names of others nor
    their side of `split_documents`.

    Raises ConfigError if a glob matches no file, for the first document that can neither be used nor left out, if no
    document remains, and if the index cannot be kept.
    """
    is_stdlib = config.paths.strip() == PYTHON_STDLIB
    found = sorted(_stdlib_files() if is_stdlib else matching_files(config.paths))
    expected = {Reason.EMPTY, Reason.NOT_UTF8, Reason.BINARY} if is_stdlib else {Reason.EMPTY}

    def leave_out(counted: DataReport, bad: BadDocumentError) -> None:
        may = config.bad_documents == SKIP or bad.reason in expected
        require_field(may, f"data.{bad.field}", getattr(config, bad.field), bad.problem, bad.remedy)
        counted.add(bad)

    report = DataReport()
    index = _open_index(config, index_dir, found, report)
    examined = _examine_files(found, config, index, leave_out)
    files = []
    for (name, path), result in zip(found, examined, strict=True):
        report.merge(result.left_out)
        if result.bad:
            report.add(result.bad)
        else:
            files.append(DocumentFile(path, name, config.text_field, result.table, result.spool))
    report.notes += index.notes if index else []
    _require_any(sum(map(len, files)), config, report)
    return DocumentSource(files, report)


def _examine_files(
    found: list[tuple[str, str]],
    config: DataConfig,
    index: DocumentIndex | None,
    leave_out: Callable[[DataReport, BadDocumentError], None],
) -> list[Examined]:
    """Find out about each (name, path); `leave_out` raises for what can neither be used nor left out, or counts it."""
    unkept = Spool() if index is None and any(needs_spool(path) for _, path in found) else None

    def examine(path: str, name: str, spool: Spool | None) -> Examined:
        lines = DataReport()  # those of a file that is left out do not count beside it
        try:
            table = examine_file(path, name, config, functools.partial(leave_out, lines), spool)
        except BadDocumentError as bad:
            return Examined(np.empty(0, DOCUMENT), DataReport(), bad)
        return Examined(table, lines, spool=spool)

    results: list[Examined | None] = [None] * len(found)
    for wait in (False, True):  # first what no other process is reading
        for number, (name, path) in enumerate(found):
            if results[number] is not None:
                continue
            if index is None:
                result = examine(path, name, unkept if needs_spool(path) else None)
            else:
                result = index.examined(path, name, functools.partial(examine, path, name), wait=wait)
            if result and result.bad:
                leave_out(DataReport(), result.bad)
            results[number] = result
    if unkept:
        unkept.flush()
    if index:
        index.close()
    return results


def _open_index(
    config: DataConfig, index_dir: Path | None, found: list[tuple[str, str]], report: DataReport
) -> DocumentIndex | None:
    """Open the index of the documents; None where none is kept."""
    if config.index_dir:
        index_dir = Path(config.index_dir).expanduser()
    elif index_dir is None or sum(os.path.getsize(path) for _, path in found if os.path.exists(path)) < LEAST_INDEXED:
        return None
    try:
        return DocumentIndex(index_dir, config)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        require_field(not config.index_dir, "data.index_dir", config.index_dir, reason, "name a folder you may write")
        report.notes.append(f"{printable(str(index_dir))} {reason}: every start reads all documents")
        return None


def _require_any(documents: int, config: DataConfig, report: DataReport) -> None:
    """Raise ConfigError unless a document remains."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report.counts.items())
    problem = f"holds no document to read ({left_out or 'blank lines alone'})"
    require_field(documents > 0, "data.paths", config.paths, problem, "name files that hold text")


def split_documents(source: DocumentSource, holdout_fraction: float) -> tuple[DocumentSource, DocumentSource]:
    """Split into (train, held out): about `holdout_fraction` of the documents are held out.

    A hash of its name alone decides about a document, so documents that come or go leave the others on their side, and
    a larger fraction only adds to those held out. Where that leaves a side empty, as it does a single document, the
    longest document is cut in two, at the end of a line where there is one: its end, as long as `holdout_fraction` of
    all text, is held out alone, or its beginning is trained on alone, as long as the rest. Raises ConfigError if no
    document is long enough for that.
    """
    held_out = source.column("name_hash").astype(np.float64) / 2**64 < holdout_fraction
    if held_out.any() and not held_out.all():
        return source.where(~held_out), source.where(held_out)
    ends_are_held_out = not held_out.any()  # else beginnings are trained on
    share = holdout_fraction if ends_are_held_out else 1 - holdout_fraction
    lengths = source.column("length")
    longest = int(np.argmax(lengths))
    name, text = source[longest].name, source[longest].text
    part = int(len(text) * min(share * lengths.sum(dtype=np.float64) / lengths[longest], max(share, 0.5)))
    at = _line_end(text, len(text) - part if ends_are_held_out else part)
    require_field(
        0 < at < len(text),
        "data.holdout_fraction",
        holdout_fraction,
        f"none of the {len(source)} documents is {'held out' if ends_are_held_out else 'left to train on'}",
        "give more documents (JSONL holds one a line), longer ones, or bring the fraction closer to 0.5",
    )
    train = source.with_part(longest, slice(0, at), alone=not ends_are_held_out)
    held_out = source.with_part(longest, slice(at, len(text)), alone=ends_are_held_out)
    train.report = held_out.report = DataReport()
    train.report.merge(source.report)
    train.report.notes.append(f"Of {printable(name)} the last {len(text) - at:,} bytes are held out.")
    return train, held_out


def _line_end(text: bytes, at: int) -> int:
    """Return the end of a line shortly before byte `at`, or where there is none, of the character before it."""
    shortly = min(at, len(text) - at) // 2
    end = text.rfind(b"\n", at - shortly, at) + 1
    if end:
        return end
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _stdlib_files() -> list[tuple[str, str]]:
    """List (name, path) of the standard library's own Python files."""
    root = sysconfig.get_paths()["stdlib"]
    names = glob.glob("**/*.py", root_dir=root, recursive=True)
    return [(name, os.path.join(root, name)) for name in names if NOT_STDLIB.isdisjoint(name.split(os.sep))]
