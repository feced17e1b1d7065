"""Documents with random access, and the split that keeps some of them away from training."""

import dataclasses
import functools
import glob
import hashlib
import operator
import os
import sysconfig
from collections.abc import Sequence

import numpy as np

from ring_attention.checks import ConfigError, printable, require_field
from ring_attention.data.bad import BadDocumentError, DataReport, Reason
from ring_attention.data.config import PYTHON_STDLIB, SKIP, DataConfig
from ring_attention.data.files import DocumentFile, open_document_file

# Third-party code differs from machine to machine; the standard library is the same for one Python version.
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, never empty, in UTF-8, and what it is called."""

    name: str
    text: bytes


class DocumentSource:
    """A sequence of documents, read on access; fits `grain.MapDataset.source`.

    Attributes:
      report: what was left out when the files were opened.
    """

    def __init__(self, files: Sequence[DocumentFile], places: np.ndarray, report: DataReport):
        """`places`, int64 [documents, 2]: the number of a document's file, and of the document in that file."""
        self._files, self._places, self.report = files, places, report

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Document:
        """Read a document; raises ConfigError if its file is not what it was when it was opened."""
        file, place = self._places[operator.index(index)]
        try:
            return Document(self._files[file].name(place), self._files[file].text(place))
        except BadDocumentError as error:
            raise ConfigError(f"data.{error.field}: {error}") from error

    def names(self) -> list[str]:
        """Name each document, without reading any."""
        return [self._files[file].name(place) for file, place in self._places]

    def where(self, chosen: np.ndarray) -> "DocumentSource":
        """Keep the documents for which `chosen`, bool [documents], holds, in the same order."""
        return DocumentSource(self._files, self._places[chosen], self.report)

    def digest(self) -> str:
        """Hash the documents' names in their order: a saved position is good where the digest is the same."""
        return hashlib.blake2b("\n".join(self.names()).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def open_documents(config: DataConfig) -> DocumentSource:
    """Open the documents that `config.paths` names, sorted by name.

    A document's name is its path below the fixed part of its glob ("/data/**/*.txt" names /data/a/b.txt "a/b.txt"), so
    that it survives a move to another machine, followed by ":line" in a JSONL file. A file that several globs match
    counts once. Every file is read and checked here, once; `files.py` says what stays in memory.

    Empty documents are left out, and of the standard library files that are deliberately no UTF-8 (test data for the
    parser). Others that cannot be used, for the reasons in `bad.Reason`, are left out if `config.bad_documents` is
    "skip"; the source's `report` has counted all of them. An archive that is damaged is left out whole, since its
    checksum stands at its end. A document that is left out changes neither the names of others nor their side of
    `split_documents`.

    Raises ConfigError if a glob matches no file, for the first document that can neither be used nor left out, and if
    no document remains.
    """
    is_stdlib = config.paths.strip() == PYTHON_STDLIB
    found = _stdlib_files() if is_stdlib else _matching_files(config.paths)
    expected = {Reason.EMPTY, Reason.NOT_UTF8, Reason.BINARY} if is_stdlib else {Reason.EMPTY}
    report = DataReport()

    def leave_out(counted: DataReport, bad: BadDocumentError) -> None:
        may = config.bad_documents == SKIP or bad.reason in expected
        require_field(may, f"data.{bad.field}", getattr(config, bad.field), bad.problem, bad.remedy)
        counted.add(bad)

    files = []
    for name, path in sorted(found):
        lines = DataReport()  # those of a file that is left out do not count beside it
        try:
            files.append(open_document_file(path, name, config, functools.partial(leave_out, lines)))
            report.merge(lines)
        except BadDocumentError as bad:
            leave_out(report, bad)
    counts = [len(documents) for documents in files]
    _require_any(sum(counts), config, report)
    file_numbers, numbers_in_file = np.repeat(np.arange(len(files)), counts), np.concatenate([*map(np.arange, counts)])
    return DocumentSource(files, np.stack([file_numbers, numbers_in_file], axis=1), report)


def _require_any(documents: int, config: DataConfig, report: DataReport) -> None:
    """Raise ConfigError unless a document remains."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report.counts.items())
    problem = f"holds no document to read ({left_out or 'blank lines alone'})"
    require_field(documents > 0, "data.paths", config.paths, problem, "name files that hold text")


def split_documents(source: DocumentSource, holdout_fraction: float) -> tuple[DocumentSource, DocumentSource]:
    """Split into (train, held out): about `holdout_fraction` of the documents are held out.

    A hash of its name alone decides about a document, so documents that come or go leave the others on their side, and
    a larger fraction only adds to those held out. Raises ConfigError if either side would be empty.
    """
    held_out = np.array([_hash_fraction(name) < holdout_fraction for name in source.names()], bool)
    for side, name in ((held_out, "held out"), (~held_out, "left to train on")):
        require_field(
            side.any(),
            "data.holdout_fraction",
            holdout_fraction,
            f"none of the {len(source)} documents is {name}",
            "give more documents (JSONL holds one a line) or bring the fraction closer to 0.5",
        )
    return source.where(~held_out), source.where(held_out)


def _hash_fraction(name: str) -> float:
    """Map a name to a number in [0, 1), the same on every machine."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _stdlib_files() -> list[tuple[str, str]]:
    """List (name, path) of the standard library's own Python files."""
    root = sysconfig.get_paths()["stdlib"]
    names = glob.glob("**/*.py", root_dir=root, recursive=True)
    return [(name, os.path.join(root, name)) for name in names if NOT_STDLIB.isdisjoint(name.split(os.sep))]


def _matching_files(paths: str) -> list[tuple[str, str]]:
    """List (name, path) of the files that match any of the globs in `paths`, each file once."""
    found = {}
    for pattern in filter(None, (pattern.strip() for pattern in paths.split(","))):
        matches = _matches(pattern)
        remedy = f"looked from {printable(os.getcwd())}, check the spelling"
        if os.path.isdir(os.path.expanduser(pattern)):
            remedy = f"it is a directory, write {pattern.rstrip(os.sep) + '/**/*.txt'!r}"
        require_field(bool(matches), "data.paths", paths, f"no file matches {pattern!r}", remedy)
        for name, path in matches:
            found.setdefault(os.path.realpath(path), (name, path))
    return list(found.values())


def _matches(pattern: str) -> list[tuple[str, str]]:
    """List (name, path) of the files that match one glob, sorted."""
    root, relative = _fixed_part(os.path.expanduser(pattern))
    try:
        names = sorted(glob.glob(relative, root_dir=root or None, recursive=True))
    except ValueError:  # a NUL byte, or half a surrogate pair: no file is called that
        return []
    return [(name, os.path.join(root, name)) for name in names if os.path.isfile(os.path.join(root, name))]


def _fixed_part(pattern: str) -> tuple[str, str]:
    """Cut a glob into the directory before its first wildcard, and the rest."""
    *directories, last = pattern.split(os.sep)
    fixed = next((i for i, part in enumerate(directories) if glob.has_magic(part)), len(directories))
    root = os.sep.join(directories[:fixed])
    if fixed and not root:
        root = os.sep
    return root, os.sep.join([*directories[fixed:], last])
