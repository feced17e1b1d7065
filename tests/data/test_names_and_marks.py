"""What a file is called and how it begins say how it is read: as JSON lines, as a text, or not at all."""

import bz2
import gzip
import json
import lzma

import pytest

from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.data.sources import open_documents

LINES = b'{"text": "one", "n": 1}\n{"text": "two"}\n'
BOM = b"\xef\xbb\xbf"


def texts(folder, **fields):
    source = open_documents(DataConfig(paths=f"{folder}/*", **fields))
    return {source[i].name: source[i].text.decode() for i in range(len(source))}


def refused(folder):
    with pytest.raises(ConfigError) as caught:
        texts(folder)
    assert str(caught.value).isprintable()
    with pytest.raises(ConfigError, match=r"holds no document to read \(1 "):
        texts(folder, bad_documents="skip")
    return str(caught.value)


@pytest.mark.parametrize("zipped", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.ldjson", "a.json", "a.Json"])
def test_json_lines_have_many_names(tmp_path, name, zipped):
    name += zipped
    (tmp_path / name).write_bytes(gzip.compress(LINES) if zipped else LINES)
    assert texts(tmp_path) == {f"{name}:1": "one", f"{name}:2": "two"}


def test_json_lines_have_the_names_of_c4_and_dolma(tmp_path):
    for name in ("c4-train.00000-of-01024.json.gz", "cc_en_head-0000.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES))
    assert list(texts(tmp_path).values()) == ["one", "two"] * 2


@pytest.mark.parametrize(
    "content", [b'[{"text": "a"}]', b"[\n", b'{\n "text": "a"\n}', b'{"a": {\n}}', b'{"a": 1,\n "b": 2}', BOM + b"{\n}"]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_json_that_is_no_lines_is_refused_whole(tmp_path, content, zipped):
    name = "a.json.gz" if zipped else "a.json"
    (tmp_path / name).write_bytes(gzip.compress(content) if zipped else content)
    assert f"{name} is one JSON document, not JSON lines; write an object a line (jq" in refused(tmp_path)


def test_json_file_loses_a_bad_line_alone(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"text": "cut\n' + LINES)
    assert texts(tmp_path, bad_documents="skip") == {"a.json:2": "one", "a.json:3": "two"}


@pytest.mark.parametrize("name", ["part-00000", "a.txt", "a.jsonl.1", "a.gz"])
@pytest.mark.parametrize("lines", [LINES, b'\n{"body": 1}\n\n{"body": 2}', BOM + LINES])
def test_json_lines_under_another_name_are_refused(tmp_path, name, lines):
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert f"{name} holds JSON lines, and its name does not say so; call it *.jsonl" in refused(tmp_path)


@pytest.mark.parametrize("text", ['{"a": 1}', "{x}\n{y}", '{"a": 1}\nprose', "{" * 9999, '{"n": ' + "9" * 5000 + "}"])
def test_text_that_begins_like_json_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path) == {"a.txt": text}


ARCHIVES = {
    "zstd": b"\x28\xb5\x2f\xfd\x04\x58",
    "gzip": gzip.compress(LINES),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "zip": b"PK\x03\x04\x14\x00",
    "Parquet": b"PAR1\x15\x04",
}


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
def test_archive_of_another_kind_is_refused_by_name(tmp_path, name, archive):
    content = ARCHIVES[archive]
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert f"{name} is in the format of {archive}, of which no text is read; unpack it; of arch" in refused(tmp_path)


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_byte_order_mark_belongs_to_no_text(tmp_path, zipped):
    for name, content in {"a.txt": "naïve".encode(), "b.jsonl": LINES}.items():
        content = BOM + content
        (tmp_path / (name + zipped)).write_bytes(gzip.compress(content) if zipped else content)
    found = texts(tmp_path)
    assert found == {f"a.txt{zipped}": "naïve", f"b.jsonl{zipped}:1": "one", f"b.jsonl{zipped}:2": "two"}


def test_byte_order_marks_may_stand_inside_or_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(BOM + LINES + BOM + LINES)
    (tmp_path / "b.txt").write_bytes(BOM)
    assert list(texts(tmp_path).values()) == ["one", "two"] * 2


def test_byte_order_mark_counts_in_offsets_not_in_the_bound(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + b"12345")
    assert texts(tmp_path, max_document_bytes=5) == {"a.txt": "12345"}
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_bytes(BOM + b'{"text": "\xff"}')
    assert "b.jsonl:1 is not valid UTF-8 at byte offset 13;" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_refused_in_words(tmp_path, name, encoding):
    content = ("\ufeff" + LINES.decode()).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    bits = encoding[4:6]
    problem = f"{name} is in UTF-{bits}, as its byte order mark says, not in UTF-8; convert it (iconv -f UTF-{bits} -t"
    assert problem in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_end_at_line_feeds_alone(tmp_path, name):
    inside = ["a\u2028b", "a\u2029b", "a\x85b", "a\x7fb", "世\u2028"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in inside).encode()
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert texts(tmp_path) == {f"{name}:{n}": text for n, text in enumerate(inside, 1)}


def test_text_keeps_its_line_breaks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert texts(tmp_path) == {"a.txt": "one\r\ntwo\rthree\n"}
