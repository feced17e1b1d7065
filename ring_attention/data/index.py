"""What was found when documents were read, kept in a folder for the next start.

The index of a file holds where its size and time are as they were. A file of JSON lines has one of its own, so that a
start that was interrupted goes on where it was, and several processes share the reading out; text files share one. An
index is written beside its place and moved there, and carries a checksum: one that is damaged is made anew.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ring_attention.checks import printable
from ring_attention.data.bad_documents import BadDocumentError, DataReport, Reason
from ring_attention.data.config import DataConfig
from ring_attention.data.files import DOCUMENT, needs_spool
from ring_attention.data.json_lines import holds_json_lines
from ring_attention.data.reading import Spool

VERSION = 1
"""Version of the folder's layout; an index of another version is not found."""

SETTLED = 1.0
"""Seconds since a file's last change after which a further one is sure to give it another time."""

Stamp = tuple[int, int]
"""A file's size in bytes and time of modification in nanoseconds."""


@dataclasses.dataclass(frozen=True)
class Examined:
    """What reading a file has shown.

    Attributes:
      table: DOCUMENT [documents].
      left_out: its lines that cannot be used.
      bad: why the file cannot be used; None if it can.
      spool: the unpacked texts, where the file had to be unpacked.
    """

    table: np.ndarray
    left_out: DataReport
    bad: BadDocumentError | None = None
    spool: Spool | None = None


Examine = Callable[[Spool | None], Examined]
"""Reads a file, and unpacks its texts into the spool."""


class DocumentIndex:
    """The indices of a corpus in a folder.

    Attributes:
      notes: what there is to say of it, in lines.
    """

    def __init__(self, folder: Path, config: DataConfig):
        """Raises OSError if the folder cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        self._folder = folder
        self._settings = [VERSION, config.text_field, config.max_document_bytes, config.bad_documents]
        self._texts_path = folder / f"{self._key(config.paths)}.index"
        self._old_texts, self._texts = self._load(self._texts_path), {}

    def examined(self, path: str, name: str, examine: Examine, *, wait: bool) -> Examined | None:
        """Return what is known of the file at `path`, or let `examine` find it out.

        Returns None if another process is at it, unless `wait` asks to wait for that.
        """
        key = self._key(path, name)
        if not holds_json_lines(path):
            stamp = _stamp(path)
            result = _still_good(self._old_texts.get(key), stamp) or examine(None)
            if _has_settled(path, stamp):
                self._texts[key] = stamp, result
            return result
        return self._find(path, key) or self._make(path, key, examine, wait)

    def close(self) -> None:
        """Keep what is known of the text files."""
        if self._texts.keys() != self._old_texts.keys() or any(
            self._texts[key][0] != stamp for key, (stamp, _) in self._old_texts.items()
        ):
            self._save(self._texts_path, self._texts)

    def _find(self, path: str, key: str) -> Examined | None:
        """Return what the index of a file of lines says; None if it does not hold."""
        entry = self._load(self._folder / f"{key}.index").get(key)
        result = _still_good(entry, _stamp(path))
        if result is None or result.bad or not needs_spool(path):
            return result
        texts = self._folder / f"{key}.texts"
        stamp, size = _stamp(texts), int((result.table["begin"] + result.table["length"]).max(initial=0))
        if stamp is None or stamp[0] != size:
            return None
        return dataclasses.replace(result, spool=Spool(texts))

    def _make(self, path: str, key: str, examine: Examine, wait: bool) -> Examined | None:
        """Read a file of lines and keep what was found; None if another process is at it."""
        with self._lock(key, wait) as may:
            found = self._find(path, key) if may else None  # another process may have made it meanwhile
            if found or not may:
                return found
            stamp, spool, part = _stamp(path), None, None
            if needs_spool(path):
                part = self._part(key)
                spool = Spool(part, writable=True)
            try:
                result = examine(spool)
                if spool and not result.bad:
                    spool.close()
                    part.replace(self._folder / f"{key}.texts")
                    result = dataclasses.replace(result, spool=Spool(self._folder / f"{key}.texts"))
            finally:
                if part:
                    part.unlink(missing_ok=True)
            if _has_settled(path, stamp):
                self._save(self._folder / f"{key}.index", {key: (stamp, result)})
            return result

    def _key(self, *names: str) -> str:
        content = json.dumps([self._settings, *names]).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def _part(self, key: str) -> Path:
        """Return where to write what is to become a file of the index."""
        return self._folder / f"{key}.{uuid.uuid4().hex}.part"

    @contextlib.contextmanager
    def _lock(self, key: str, wait: bool) -> Iterator[bool]:
        """Keep other processes from reading the same file; yields whether none does.

        Where the file system knows no locks, each process reads all: what they write is the same.
        """
        try:
            file = open(self._folder / "lock", "ab")  # noqa: SIM115
        except OSError:
            yield True
            return
        with file:
            held = False
            try:
                mode = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
                fcntl.lockf(file, mode, 1, int(key[:15], 16))
                held = True
            except (BlockingIOError, PermissionError):
                yield False
                return
            except OSError:
                pass
            if held:
                for left in self._folder.glob(f"{key}.*.part"):  # by a process that was killed
                    left.unlink(missing_ok=True)
            yield True

    def _load(self, path: Path) -> dict[str, tuple[Stamp, Examined]]:
        """Read an index; {} where there is none that can be used."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.notes.append(f"{printable(str(path))} cannot be read ({error.strerror}): its documents are read again")
            return {}
        try:
            return _unpack(content)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            self.notes.append(f"{printable(str(path))} was damaged: its documents were read again")
            return {}

    def _save(self, path: Path, entries: dict[str, tuple[Stamp, Examined]]) -> None:
        part = None
        try:
            part = self._part(path.stem)
            part.write_bytes(_pack(entries))
            part.replace(path)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            self.notes.append(f"{printable(str(path))} {reason}: the next start reads its documents again")
            if part:
                part.unlink(missing_ok=True)


def _stamp(path: str | Path) -> Stamp | None:
    """Return the stamp of a file; None if it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _has_settled(path: str, stamp: Stamp | None) -> bool:
    """Whether a file still has the stamp, and will have another when it changes again."""
    return stamp is not None and stamp == _stamp(path) and time.time() - stamp[1] / 1e9 > SETTLED


def _still_good(entry: tuple[Stamp, Examined] | None, stamp: Stamp | None) -> Examined | None:
    return entry[1] if entry and entry[0] == stamp else None


def _pack(entries: dict[str, tuple[Stamp, Examined]]) -> bytes:
    """Return a line with a checksum of the rest, a line of JSON, and the tables, as bytes."""
    fields = {
        key: {
            "stamp": stamp,
            "documents": len(result.table),
            "left_out": [[kind, count, left_out.examples[kind]] for kind, count in left_out.counts.items()],
            "bad": bad and [bad.reason, bad.problem, bad.remedy, bad.field],
        }
        for key, (stamp, result) in entries.items()
        for left_out, bad in [(result.left_out, result.bad)]
    }
    content = json.dumps(fields).encode() + b"\n" + b"".join(result.table.tobytes() for _, result in entries.values())
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode() + b"\n" + content


def _unpack(content: bytes) -> dict[str, tuple[Stamp, Examined]]:
    """Return what `_pack` packed; raises one of several errors for anything else."""
    checksum, _, content = content.partition(b"\n")
    if hashlib.blake2b(content, digest_size=16).hexdigest().encode() != checksum:
        raise ValueError("wrong checksum")
    header, _, tables = content.partition(b"\n")
    rows, entries, begin = np.frombuffer(tables, DOCUMENT), {}, 0
    for key, fields in json.loads(header).items():
        table = rows[begin : begin + fields["documents"]]
        begin += fields["documents"]
        report = DataReport()
        for reason, count, example in fields["left_out"]:
            report.counts[Reason(reason)], report.examples[Reason(reason)] = int(count), str(example)
        bad = fields["bad"] and BadDocumentError(Reason(fields["bad"][0]), *map(str, fields["bad"][1:]))
        entries[key] = tuple(fields["stamp"]), Examined(table, report, bad)
    if begin != len(rows):
        raise ValueError("other documents than the header says")
    return entries
