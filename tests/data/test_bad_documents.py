"""Documents that cannot be used are refused or left out and counted, as configured, and none fills the memory."""

import gzip
import itertools
import json
import os
import tracemalloc

import pytest

from ring_attention.checks import ConfigError
from ring_attention.data import reading
from ring_attention.data.bad_documents import DataReport, Reason
from ring_attention.data.config import DataConfig
from ring_attention.data.loader import TrainLoader
from ring_attention.data.sources import open_documents, split_documents
from ring_attention.data.tokenizers import load_tokenizer
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.training.batches import Corpus

LIMIT = 2**20
START = 256

# (file, content, the field that is to blame, what the message says of it)
BAD_FILES = {
    "not UTF-8": ("b.txt", b"caf\xe9", "data.paths", "b.txt is not valid UTF-8 at byte offset 3"),
    "cut inside a character": ("b.txt", "世".encode()[:2], "data.paths", "b.txt is not valid UTF-8 at byte offset 0"),
    "binary": ("b.bin", b"text\0", "data.paths", "b.bin holds a NUL byte at byte offset 4, so it is binary"),
    "text in UTF-16": ("b.txt", "text".encode("utf-16-le"), "data.paths", "b.txt holds a NUL byte at byte offset 1"),
    "no archive": ("b.txt.gz", b"text", "data.paths", "b.txt.gz cannot be read (Not a gzipped file (b'te'))"),
    "cut archive": ("b.gz", gzip.compress(b"text " * 99)[:-12], "data.paths", "b.gz cannot be read (Compressed file"),
    "cut archive of lines": (
        "b.jsonl.gz",
        gzip.compress(b'{"text": "whole"}\n' * 99)[:-12],
        "data.paths",
        "b.jsonl.gz cannot be read (Compressed file ended before",
    ),
    "too long": (
        "b.txt",
        b"x" * (LIMIT + 1),
        "data.max_document_bytes",
        "b.txt has more than 1,048,576 bytes",
    ),
    "swollen archive": ("b.gz", gzip.compress(b"x" * 2 * LIMIT), "data.max_document_bytes", "b.gz has more than"),
}

# (content, field, message)
BAD_LINES = {
    "not UTF-8": (b'{"text": "caf\xe9"}', "data.paths", "a.jsonl:2 is not valid UTF-8 at byte offset 31"),
    "binary": (b'{"text": "a\0"}', "data.paths", "a.jsonl:2 holds a NUL byte at byte offset 29"),
    "cut off": (b'{"text": "cut', "data.paths", "a.jsonl:2 is not JSON (Unterminated string starting at column 10)"),
    "nested": (b"[" * 99_999, "data.paths", "a.jsonl:2 is not JSON that can be read (nested too deeply)"),
    "digits": (b'{"n": ' + b"9" * 4301 + b"}", "data.paths", "a.jsonl:2 is not JSON that can be read (a number has"),
    "a list": (b"[1]", "data.paths", "a.jsonl:2 holds a list, not an object"),
    "no field": (b'{"body": "b"}', "data.text_field", "a.jsonl:2 has only the fields ['body']"),
    "no string": (b'{"text": ["b"]}', "data.text_field", "a.jsonl:2 holds a list there, not a string"),
    "half a character": (
        rb'{"text": "\ud800"}',
        "data.paths",
        "a.jsonl:2 escapes half a surrogate pair at char",
    ),
    "too long": (
        b'{"text": "%b"}' % (b"x" * LIMIT),
        "data.max_document_bytes",
        "a.jsonl:2 has more than 1,048,576 bytes",
    ),
}


def config_of(folder, **fields):
    return DataConfig(paths=f"{folder}/*", **({"max_document_bytes": LIMIT, "bad_documents": "skip"} | fields))


def contents(source):
    return {document.name: document.text for document in (source[index] for index in range(len(source)))}


def refused(folder, **fields):
    with pytest.raises(ConfigError) as caught:
        open_documents(config_of(folder, bad_documents="refuse", **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_or_left_out_and_counted(tmp_path, case):
    name, content, field, example = BAD_FILES[case]
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path)
    assert message.startswith(f"{field}=")
    assert f"{tmp_path}/{example}" in message
    assert "; " in message.partition(example)[2]
    source = open_documents(config_of(tmp_path))
    assert contents(source) == {"a.txt": b"good"}
    assert source.report.total == 1
    assert example in source.report.lines()[1]


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "zipped"])
def test_bad_line_is_refused_or_left_out_and_counted(tmp_path, case, zipped):
    bad, field, example = BAD_LINES[case]
    lines = b'{"text": "first"}\n' + bad + b'\n{"text": "third"}\n'
    name = "a.jsonl.gz" if zipped else "a.jsonl"
    (tmp_path / name).write_bytes(gzip.compress(lines) if zipped else lines)
    example = example.replace("a.jsonl", f"{tmp_path}/{name}")
    message = refused(tmp_path)
    assert message.startswith(f"{field}=")
    assert example in message
    source = open_documents(config_of(tmp_path))
    assert contents(source) == {f"{name}:1": b"first", f"{name}:3": b"third"}
    assert source.report.total == 1
    assert example in source.report.lines()[1]


def test_report_counts_by_reason_and_shows_the_first_of_each(tmp_path):
    good = json.dumps({"text": "good"})
    (tmp_path / "a.jsonl").write_text("\n".join([good, '{"text": ""}', "[]", "", good, "{", "7", '{"text": 8}']))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_bytes(b"")
    assert open_documents(config_of(tmp_path)).report.lines() == [
        "Documents left out: 7",
        f"  2 empty, the first: {tmp_path}/a.jsonl:2 has an empty text",
        f"  1 not UTF-8, the first: {tmp_path}/b.txt is not valid UTF-8 at byte offset 0",
        f"  3 no JSON object, the first: {tmp_path}/a.jsonl:3 holds a list, not an object",
        f"  1 no string in the text field, the first: {tmp_path}/a.jsonl:8 holds a int there, not a string",
    ]


def test_report_counts_no_lines_of_an_archive_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'[]\n{"text": "good"}\n' * 99)[:-12])
    report = open_documents(config_of(tmp_path)).report
    assert report.counts == {Reason.UNREADABLE: 1}
    assert f"1 unreadable, the first: {tmp_path}/b.jsonl.gz cannot be read" in report.lines()[1]


def test_report_is_empty_for_data_without_fault(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    report = open_documents(config_of(tmp_path)).report
    assert (report, report.lines(), report.total) == (DataReport(), [], 0)


def test_left_out_documents_leave_others_names_and_sides(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    before = [part.names() for part in split_documents(open_documents(config_of(tmp_path)), 0.3)]
    gone = {3, 17, 30, 31, 59}
    (tmp_path / "a.jsonl").write_text("\n".join("broken" if i in gone else line for i, line in enumerate(lines)))
    train, held_out = split_documents(open_documents(config_of(tmp_path)), 0.3)
    names = {f"a.jsonl:{i + 1}" for i in gone}
    assert [train.names(), held_out.names()] == [[name for name in part if name not in names] for part in before]
    assert train.report.counts == held_out.report.counts == {Reason.NOT_JSON: 5}


def test_corpus_hands_the_report_on(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("text" if i else "")
    corpus = Corpus.open(config_of(tmp_path, holdout_fraction=0.5))
    assert corpus.report.lines() == ["Documents left out: 1", f"  1 empty, the first: {tmp_path}/0.txt is empty"]


def test_open_documents_refuses_nothing_to_read_with_counts(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds no document to read \(1 not UTF-8, 1 empty\); name files that hold"):
        open_documents(config_of(tmp_path))


def test_report_escapes_a_name_that_would_break_the_line(tmp_path):
    (tmp_path / "two\nlines.txt").write_bytes(b"\xff")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"\xff")
    assert r"caf\udce9.txt' is not valid UTF-8" in refused(tmp_path)
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).unlink()
    assert r"two\nlines.txt' is not valid UTF-8" in refused(tmp_path)


@pytest.mark.parametrize("paths", ["a\0b", "\ud800/*.txt", "a\nb/*.txt", "**/\0"])
def test_glob_that_no_file_can_match_gives_one_line(paths):
    with pytest.raises(ConfigError, match="no file matches") as caught:
        open_documents(DataConfig(paths=paths))
    assert str(caught.value).isprintable()


# --- Bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["at the end of the file", "before a line break"])
def test_max_document_bytes_lets_in_what_is_just_as_long(tmp_path, name, end):
    fits = b"x" * 99 if ".txt" in name else b'{"text": "%b"}' % (b"x" * 87)
    end = end if "jsonl" in name else b""
    compress = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(compress(fits + end))
    assert len(open_documents(config_of(tmp_path, max_document_bytes=99))) == 1
    assert "has more than 98 bytes; split it, or raise the bound" in refused(tmp_path, max_document_bytes=98)


def peak_of_opening(folder, **fields):
    """(the documents, bytes that were allocated at once while the files were opened)."""
    tracemalloc.start()
    try:
        return open_documents(config_of(folder, **fields)), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LONG = 48 * 2**20


def write_long(folder, name):
    """A document of LONG bytes after a short one, and one after it where lines are documents."""
    (folder / "0.txt").write_text("short")
    if name == "hole.jsonl":
        with open(folder / name, "wb") as file:  # one line, nearly all of it a hole that no disk stores
            file.write(b'{"text": "')
            file.seek(LONG)
            file.write(b'"}\n{"text": "after"}\n')
    elif name == "a.jsonl.gz":
        (folder / name).write_bytes(gzip.compress(b'{"text": "' + b"x" * LONG + b'"}\n{"text": "after"}\n', 1))
    else:
        (folder / name).write_bytes(gzip.compress(b"x" * LONG, 1) if name.endswith(".gz") else b"x" * LONG)


@pytest.mark.parametrize("name", ["hole.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"])
def test_long_document_is_left_out_without_being_held(tmp_path, name):
    write_long(tmp_path, name)
    source, peak = peak_of_opening(tmp_path)
    assert contents(source) == {"0.txt": b"short"} | ({f"{name}:2": b"after"} if "jsonl" in name else {})
    assert source.report.counts == {Reason.TOO_LONG: 1}
    assert peak < 8 * 2**20


def test_memory_measure_sees_a_long_document_that_is_held(tmp_path):
    write_long(tmp_path, "a.jsonl.gz")
    _, peak = peak_of_opening(tmp_path, max_document_bytes=2 * LONG)
    assert peak > LONG


def test_long_line_is_refused_before_its_rest_is_read(tmp_path, monkeypatch):
    write_long(tmp_path, "hole.jsonl")
    monkeypatch.setattr(reading, "_skip_line", lambda file: pytest.fail("read on"))
    assert "hole.jsonl:1 has more than 1,048,576 bytes" in refused(tmp_path)


def test_max_document_bytes_is_256_mib_and_fits_32_bits():
    assert DataConfig().max_document_bytes == 256 * 2**20
    with pytest.raises(ConfigError, match=r"^data.max_document_bytes=2147483648: must lie in \[1, 2147483647\]; "):
        DataConfig(max_document_bytes=2**31)


# --- Files that change under a run ------------------------------------------------------------------------------------


def rewrite(path, change):
    """Make of the file what `change` says, by the same path."""
    content = path.read_bytes()
    if change == "deleted":
        path.unlink()
    elif change == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif change == "emptied":
        path.write_bytes(b"")
    elif change == "longer":
        path.write_bytes(b" " + content)
    elif change == "another of the same length":
        zipped = path.suffix == ".gz"
        text = (gzip.decompress(content) if zipped else content).replace(b"text 7", b"test 7")
        path.write_bytes(gzip.compress(text) if zipped else text)
    else:
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))


@pytest.fixture(params=["a.txt", "a.txt.gz", "a.jsonl"])
def opened(request, tmp_path):
    """(path, the documents of the file, opened)."""
    path = tmp_path / request.param
    is_lines, zipped = ".jsonl" in request.param, request.param.endswith(".gz")
    texts = [f"text {i}" for i in range(20)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts) if is_lines else " ".join(texts)
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    return path, open_documents(config_of(tmp_path))


@pytest.mark.parametrize("change", ["deleted", "cut", "emptied", "longer", "another of the same length"])
def test_file_changed_after_opening_gives_one_line(opened, change):
    path, source = opened
    rewrite(path, change)
    index = -1 if len(source) == 1 or change == "cut" else 7
    with pytest.raises(
        ConfigError, match=r"^data\.paths: .*(has changed since it was opened|cannot be read) \("
    ) as error:
        source[index]
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()


def test_file_rewritten_with_the_same_content_is_no_error(opened):
    path, source = opened
    before = contents(source)
    rewrite(path, "touched")
    assert contents(source) == before


def test_appended_lines_are_not_read_and_do_no_harm(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    source = open_documents(config_of(tmp_path))
    with path.open("a") as file:
        file.write('{"text": "two"}\n')
    assert contents(source) == {"a.jsonl:1": b"one"}


def test_loader_yields_no_row_of_a_changed_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "abc" * 20}) + "\n" for _ in range(40)))
    loader = TrainLoader(
        open_documents(config_of(tmp_path)),
        load_tokenizer("bytes"),
        seed=0,
        streams=1,
        seq_len=16,
        batch_size=1,
        layout=SequenceLayout("contiguous", 1),
    )
    next(loader)
    path.write_bytes(path.read_bytes().replace(b"abc", b"xyz"))
    rows = []
    with pytest.raises(ConfigError, match="has changed since it was opened"):
        rows.extend(itertools.islice(loader, 400))
    assert 0 < len(rows) < 400
    assert all(set(row["tokens"].reshape(-1).tolist()) <= {START, *b"abc"} for row in rows)
