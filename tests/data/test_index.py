"""The index of documents: a second start reads nothing that has not changed, and no damage or race is believed."""

import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from ring_attention.checks import ConfigError
from ring_attention.data import reading, sources
from ring_attention.data.bad_documents import DataReport, Reason
from ring_attention.data.config import DataConfig
from ring_attention.data.files import DOCUMENT
from ring_attention.data.index import DocumentIndex, Examined
from ring_attention.data.sources import open_documents, split_documents

OLD = (time.time() - 1000) * 10**9


def write(path, content, *, age=0):
    path.write_bytes(gzip.compress(content, 1) if path.name.endswith(".gz") else content)
    os.utime(path, ns=(int(OLD) - age, int(OLD) - age))


def lines(*texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture
def corpus(tmp_path):
    """A folder of documents, none of which changed lately."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "a.txt", b"a text")
    write(folder / "b.txt.gz", b"another")
    write(folder / "c.jsonl", lines("one", "two", "", "three"))
    write(folder / "d.json.gz", lines("vier", "fünf", "sechs"))
    return folder


def config_of(folder, **fields):
    return DataConfig(paths=f"{folder}/*", **({"index_dir": str(folder.parent / "index")} | fields))


def contents(source):
    return {source[i].name: source[i].text for i in range(len(source))}


@pytest.fixture
def opened(monkeypatch):
    """The files that are read from their beginning on."""
    read, open_really = [], reading._open
    monkeypatch.setattr(reading, "_open", lambda path: read.append(os.path.basename(path)) or open_really(path))
    return read


def test_index_alone_is_read_at_a_second_start(corpus, opened):
    first = open_documents(config_of(corpus))
    assert opened == ["a.txt", "b.txt.gz", "c.jsonl", "d.json.gz"]
    opened.clear()
    second = open_documents(config_of(corpus))
    assert opened == []
    assert contents(second) == contents(first) == contents(open_documents(config_of(corpus, index_dir="")))
    assert second.digest() == first.digest()
    assert second.report == first.report
    assert second.report.counts == {Reason.EMPTY: 1}
    assert [part.names() for part in split_documents(second, 0.4)] == [
        part.names() for part in split_documents(first, 0.4)
    ]


@pytest.mark.parametrize("name", ["a.txt", "b.txt.gz", "c.jsonl", "d.json.gz"])
@pytest.mark.parametrize("change", ["size", "time"])
def test_index_has_a_changed_file_read_again_and_no_other(corpus, opened, name, change):
    before = open_documents(config_of(corpus)).digest()
    content = (
        lines("one", "twO", "more" * (change == "size"))
        if "json" in name
        else b"a texT" + b"!?#" * 9 * (change == "size")
    )
    write(corpus / name, content, age=5 if change == "time" else 0)
    opened.clear()
    source = open_documents(config_of(corpus))
    assert opened == [name]
    assert contents(source) == contents(open_documents(config_of(corpus, index_dir="")))
    assert source.digest() != before
    opened.clear()
    assert open_documents(config_of(corpus)).digest() == source.digest()
    assert opened == []


def test_index_follows_files_that_come_and_go(corpus, opened):
    open_documents(config_of(corpus))
    (corpus / "a.txt").unlink()
    (corpus / "c.jsonl").unlink()
    write(corpus / "e.txt", b"new")
    opened.clear()
    source = open_documents(config_of(corpus))
    assert opened == ["e.txt"]
    assert [name for name in source.names() if not name.startswith("d")] == ["b.txt.gz", "e.txt"]


@pytest.mark.parametrize(
    "fields", [{"text_field": "body"}, {"max_document_bytes": 15}, {"bad_documents": "refuse"}], ids=str
)
def test_index_of_other_settings_is_another(corpus, fields):
    write(corpus / "c.jsonl", lines("a text of many letters") + b'[]\n{"body": "b"}\n')
    skip = dict(bad_documents="skip")
    open_documents(config_of(corpus, **skip))

    def outcome(**more):
        try:
            return contents(open_documents(config_of(corpus, **(skip | fields | more))))
        except ConfigError as error:
            return str(error)

    assert outcome() == outcome(index_dir="") != contents(open_documents(config_of(corpus, **skip)))


def test_index_reports_left_out_documents_without_reading(corpus, opened):
    write(corpus / "e.txt", b"\xff")
    write(corpus / "f.jsonl", b"[1]\n")
    (corpus / "g.jsonl.gz").write_bytes(gzip.compress(lines("x" * 99))[:-9])
    os.utime(corpus / "g.jsonl.gz", (1, 1))
    first = open_documents(config_of(corpus, bad_documents="skip")).report
    opened.clear()
    second = open_documents(config_of(corpus, bad_documents="skip")).report
    assert opened == []
    assert second == first
    assert second.total == 4
    (corpus / "f.jsonl").unlink()
    (corpus / "g.jsonl.gz").unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"e\.txt is not valid UTF-8"):
            open_documents(config_of(corpus))


def test_index_does_not_keep_a_file_changed_this_moment(corpus, opened):
    os.utime(corpus / "a.txt")
    os.utime(corpus / "c.jsonl")
    open_documents(config_of(corpus))
    opened.clear()
    open_documents(config_of(corpus))
    assert opened == ["a.txt", "c.jsonl"]


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a bit": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    "header": lambda content: content.replace(b"stamp", b"stomp"),
    "noise": lambda content: bytes(range(256)) * 9,
    "longer": lambda content: content + b"\0" * 28,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_index_that_is_damaged_is_made_anew_with_a_line(corpus, opened, damage):
    first = open_documents(config_of(corpus))
    indices = sorted((corpus.parent / "index").glob("*.index"))
    assert len(indices) == 3
    for path in indices:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    opened.clear()
    source = open_documents(config_of(corpus))
    assert sorted(opened) == ["a.txt", "b.txt.gz", "c.jsonl", "d.json.gz"]
    assert contents(source) == contents(first)
    notes = [line for line in source.report.lines() if "was damaged: its documents were read again" in line]
    assert {path.name for path in indices} == {os.path.basename(note.split()[0]) for note in notes}
    assert not open_documents(config_of(corpus)).report.notes


def test_index_unpacks_lost_texts_again_and_refuses_changed(corpus, opened):
    first = contents(open_documents(config_of(corpus)))
    (texts,) = (corpus.parent / "index").glob("*.texts")
    assert texts.read_bytes() == "vierfünfsechs".encode()
    for spoil in (texts.unlink, lambda: texts.write_bytes(b"vier")):
        spoil()
        opened.clear()
        assert contents(open_documents(config_of(corpus))) == first
        assert "d.json.gz" in opened
    texts.write_bytes("vierfünfsechS".encode())
    source = open_documents(config_of(corpus))
    with pytest.raises(ConfigError, match=r"\.texts has changed since it was opened"):
        contents(source)


def test_index_resumes_an_interrupted_start(corpus, opened, monkeypatch):
    write(corpus / "e.jsonl.gz", lines("x"))
    examine = sources.examine_file

    def interrupted(path, *args):
        if path.endswith("e.jsonl.gz"):
            args[-1].append(b"half")
            raise KeyboardInterrupt
        return examine(path, *args)

    monkeypatch.setattr(sources, "examine_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_documents(config_of(corpus))
    monkeypatch.setattr(sources, "examine_file", examine)
    assert not list((corpus.parent / "index").glob("*.part"))
    opened.clear()
    source = open_documents(config_of(corpus))
    assert opened == ["a.txt", "b.txt.gz", "e.jsonl.gz"]
    assert contents(source)["e.jsonl.gz:1"] == b"x"


def test_index_clears_away_what_a_killed_process_left(corpus):
    open_documents(config_of(corpus))
    index = corpus.parent / "index"
    (texts,) = index.glob("*.texts")
    (index / f"{texts.stem}.abc.part").write_bytes(b"half")
    texts.unlink()
    open_documents(config_of(corpus))
    assert not list(index.glob("*.part"))


SCRIPT = """
import sys
from ring_attention.data.config import DataConfig
from ring_attention.data.sources import open_documents
source = open_documents(DataConfig(paths=sys.argv[1], index_dir=sys.argv[2]))
print(len(source), source.digest(), sum(len(source[i].text) for i in range(len(source))))
"""


def test_index_gives_processes_that_start_at_once_the_same(corpus):
    for number in range(6):
        write(corpus / f"{number}.jsonl.gz", lines(*(f"text {n} " * 40 for n in range(400))))
        write(corpus / f"{number}.jsonl", lines(*(f"text {n} " * 40 for n in range(400))))
    index = corpus.parent / "index"
    command = [sys.executable, "-c", SCRIPT, f"{corpus}/*", str(index)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=120)[0] for process in running}
    alone = open_documents(config_of(corpus, index_dir=""))
    assert said == {f"{len(alone)} {alone.digest()} {sum(map(len, contents(alone).values()))}\n"}
    assert not list(index.glob("*.part"))
    assert not open_documents(config_of(corpus)).report.notes


def test_index_waits_last_for_files_that_others_read(corpus, monkeypatch):
    """While another process holds the lock of c.jsonl, the others are read first."""
    asked, examined = [], sources.DocumentIndex.examined

    def busy(index, path, name, examine, *, wait):
        asked.append((name, wait))
        return None if name == "c.jsonl" and not wait else examined(index, path, name, examine, wait=wait)

    monkeypatch.setattr(sources.DocumentIndex, "examined", busy)
    assert len(open_documents(config_of(corpus))) == 8
    assert asked == [("a.txt", False), ("b.txt.gz", False), ("c.jsonl", False), ("d.json.gz", False), ("c.jsonl", True)]


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_index_leaves_a_file_to_its_reader_until_it_is_gone(corpus):
    open_documents(config_of(corpus))
    index, path = DocumentIndex(corpus.parent / "index", config_of(corpus)), corpus / "c.jsonl"
    os.utime(path, (1, 1))
    command = [sys.executable, "-c", HOLD, str(corpus.parent / "index" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        assert index.examined(str(path), "c.jsonl", lambda spool: pytest.fail("read it"), wait=False) is None
        other.kill()
    result = Examined(np.empty(0, DOCUMENT), DataReport())
    assert index.examined(str(path), "c.jsonl", lambda spool: result, wait=False) is result


def test_index_that_cannot_be_kept_is_refused_if_asked_for(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^data\.index_dir=.*cannot be written \(Not a directory\); name a folder"):
        open_documents(config_of(corpus, index_dir=str(tmp_path / "file" / "index")))
    monkeypatch.setattr(sources, "LEAST_INDEXED", 1)
    source = open_documents(config_of(corpus, index_dir=""), tmp_path / "file" / "index")
    assert len(source) == 8
    assert source.report.notes == [
        f"{tmp_path}/file/index cannot be written (Not a directory): every start reads all documents"
    ]


def test_index_on_a_full_disk_gives_one_line(corpus, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.DocumentIndex, "_part", full)
    (corpus / "d.json.gz").unlink()
    notes = open_documents(config_of(corpus)).report.notes
    assert len(notes) == 2
    assert all("cannot be written (No space left on device): the next start reads its doc" in note for note in notes)


@pytest.mark.parametrize("index_dir", ["", "index"])
def test_spool_without_room_gives_one_line(corpus, index_dir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ring_attention.data.reading.Spool._write", full)
    with pytest.raises(
        ConfigError, match=r"^data\.index_dir: .* cannot be written \(No space left on device\)"
    ) as error:
        open_documents(config_of(corpus, index_dir=index_dir and str(tmp_path / index_dir)))
    assert ("$TMPDIR" in str(error.value)) == (not index_dir)
    assert str(error.value).isprintable()
    assert not list(tmp_path.glob("index/*.part"))


def test_index_is_not_kept_for_small_corpora(corpus, tmp_path):
    open_documents(config_of(corpus, index_dir=""), tmp_path / "run" / "documents")
    assert not (tmp_path / "run").exists()


def test_index_of_a_large_corpus_is_kept_by_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LEAST_INDEXED", 10)
    open_documents(config_of(corpus, index_dir=""), tmp_path / "run" / "documents")
    assert len(list((tmp_path / "run" / "documents").glob("*.index"))) == 3


DOCUMENTS = 6000


def test_index_costs_tens_of_bytes_a_document(tmp_path):
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / "a.jsonl.gz", lines(*(f"{n} " + "text " * 400 for n in range(DOCUMENTS))))
    index = str(tmp_path / "index")
    for index_dir in ("", index, index):
        tracemalloc.start()
        try:
            source = open_documents(config_of(tmp_path / "corpus", index_dir=index_dir))
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 40 * DOCUMENTS + 300_000
        assert peak < 6 * 2**20  # the texts are 12 MB
        assert source[7].text.startswith(b"7 text")


# --- The digest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "b.txt.gz", "c.jsonl", "d.json.gz"])
def test_digest_tells_contents_under_the_same_names_apart(corpus, name):
    before = open_documents(config_of(corpus, index_dir=""))
    content = before[before.names().index(name if "txt" in name else f"{name}:1")].text
    changed = content.replace(content[-1:], b"#")
    write(corpus / name, changed if "txt" in name else lines(changed.decode(), "two"))
    if "txt" in name:
        assert open_documents(config_of(corpus, index_dir="")).names() == before.names()
    assert open_documents(config_of(corpus, index_dir="")).digest() != before.digest()


def test_digest_does_not_depend_on_place_and_time(corpus, tmp_path):
    before = open_documents(config_of(corpus, index_dir="")).digest()
    (tmp_path / "moved").mkdir()
    for path in corpus.iterdir():
        os.utime(path)
        path.rename(tmp_path / "moved" / path.name)
    assert open_documents(config_of(tmp_path / "moved")).digest() == before
