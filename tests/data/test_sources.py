import gzip
import json

import grain
import pytest

from ring_attention.checks import ConfigError
from ring_attention.data.bad_documents import Reason
from ring_attention.data.config import DataConfig
from ring_attention.data.sources import open_documents, split_documents


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def json_lines(*objects):
    return "".join(json.dumps(fields) + "\n" for fields in objects)


def documents(paths, **fields):
    source = open_documents(DataConfig(paths=str(paths), **fields))
    return {document.name: document.text for document in source}


def error_of(paths, **fields):
    with pytest.raises(ConfigError) as caught:
        open_documents(DataConfig(paths=str(paths), **fields))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_document_names_are_paths_below_a_globs_fixed_part(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c/d.txt", "a/other.md"):
        write(tmp_path / name, f"text of {name}")
    found = documents(tmp_path / "**" / "*.txt")
    assert list(found) == ["a/c/d.txt", "a/z.txt", "b.txt"]
    assert found["a/z.txt"] == b"text of a/z.txt"


def test_paths_take_relative_globs_paths_and_commas(tmp_path, monkeypatch):
    write(tmp_path / "x" / "a.txt", "A")
    write(tmp_path / "y.md", "Y")
    monkeypatch.chdir(tmp_path)
    assert documents("x/*.txt, y.md") == {"a.txt": b"A", "y.md": b"Y"}


def test_paths_take_a_file_matched_twice_once(tmp_path):
    write(tmp_path / "a.txt", "A")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert documents(f"{tmp_path}/*.txt,{tmp_path}/a.txt") == {"a.txt": b"A"}


def test_link_is_read_by_its_own_name(tmp_path):
    write(tmp_path / "blobs" / "0123", json_lines({"text": "one"}, {"text": "two"}))
    (tmp_path / "data.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    assert documents(tmp_path / "*.jsonl") == {"data.jsonl:1": b"one", "data.jsonl:2": b"two"}


def test_gzipped_text_reads_as_the_text_itself(tmp_path):
    write(tmp_path / "a.txt.gz", "naïve 世界")
    assert documents(tmp_path / "*") == {"a.txt.gz": "naïve 世界".encode()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_hold_a_document_each_named_by_line(tmp_path, name):
    lines = json_lines({"text": "erste\nZeile"}, {"text": ""}) + "\n \n" + json_lines({"text": "世界", "id": 7})
    write(tmp_path / name, lines)
    assert documents(tmp_path / name) == {f"{name}:1": b"erste\nZeile", f"{name}:5": "世界".encode()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_reached_in_any_order(tmp_path, name):
    texts = [f"{i} " * (i + 1) for i in range(50)]
    write(tmp_path / name, json_lines(*({"body": text} for text in texts)).rstrip("\n"))
    source = open_documents(DataConfig(paths=str(tmp_path / name), text_field="body"))
    assert [source[i].text.decode() for i in (49, 3, 17, 0)] == [texts[i] for i in (49, 3, 17, 0)]


def test_empty_documents_are_left_out(tmp_path):
    write(tmp_path / "a.txt", "A")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "empty.txt.gz", "")
    assert documents(tmp_path / "*") == {"a.txt": b"A"}


def test_document_source_fits_grain(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.txt", name)
    source = open_documents(DataConfig(paths=str(tmp_path / "*")))
    assert [d.text for d in grain.MapDataset.source(source)] == [b"a", b"b", b"c"]
    with pytest.raises(IndexError):
        source[3]


def test_paths_refuse_a_glob_without_a_match(tmp_path):
    write(tmp_path / "a.txt", "A")
    paths = f"{tmp_path}/*.txt,{tmp_path}/*.text"
    message = error_of(paths)
    assert message.startswith(f"data.paths='{paths}': no file matches '{tmp_path}/*.text'; looked from ")


@pytest.mark.parametrize("paths", ["", " ", " , "])
def test_paths_that_name_nothing_are_an_error(paths):
    assert "names no file; give globs such as" in error_of(paths)


def test_paths_tell_a_directory_how_to_become_a_glob(tmp_path):
    assert f"it is a directory, write '{tmp_path}/**/*.txt'" in error_of(f"{tmp_path}/")


def test_files_without_any_text_are_an_error(tmp_path):
    write(tmp_path / "a.txt", "")
    assert "holds no document to read (1 empty); name files that hold text" in error_of(tmp_path / "*")


@pytest.mark.parametrize(
    ("name", "prefix", "line"),
    [("a.txt", "", ""), ("a.jsonl", '{"text": "one"}\n', ":2"), ("a.txt.gz", "", ""), ("b.txt", "世" * 699_051, "")],
)
def test_invalid_utf8_names_file_line_and_byte_offset(tmp_path, name, prefix, line):
    write(tmp_path / name, prefix.encode() + b"caf\xe9 creme")
    message = error_of(tmp_path / name)
    prefix = prefix.encode()
    assert f"{tmp_path / name}{line} is not valid UTF-8 at byte offset {len(prefix) + 3}; convert it (iconv" in message


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", ["not gzip", "cut short", "garbled"])
def test_damaged_archive_is_an_error(tmp_path, name, damage):
    archive = gzip.compress(b"text " * 99)
    content = {"not gzip": b"text", "cut short": archive[:-12], "garbled": archive[:10] + b"\xff" * 20}[damage]
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} cannot be read (" in error_of(tmp_path / name)


def test_file_that_the_system_refuses_is_an_error(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "a.txt", "A")
    monkeypatch.setattr("builtins.open", refuse)
    assert f"{tmp_path / 'a.txt'} cannot be read (Permission denied); repair it or" in error_of(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut', "is not JSON (Unterminated string starting at column 10); repair that line"),
        ("[1, 2]", "holds a list, not an object"),
        (r'{"text": "\ud800"}', "escapes half a surrogate pair at character 0 of its text"),
    ],
)
def test_bad_json_line_is_named(tmp_path, name, line, problem):
    write(tmp_path / name, json_lines({"text": "good"}) + line)
    message = error_of(tmp_path / name)
    assert message.startswith("data.paths=")
    assert f"{tmp_path / name}:2 {problem}" in message


def test_missing_text_field_is_named_with_those_there(tmp_path):
    write(tmp_path / "a.jsonl", json_lines({"text": "good"}, {"title": "t", "body": "b"}))
    message = error_of(tmp_path / "a.jsonl")
    where = f"{tmp_path}/a.jsonl:2"
    assert (
        message
        == f"data.text_field='text': {where} has only the fields ['body', 'title']; name the one that holds text"
    )


def test_text_field_without_a_string_is_an_error(tmp_path):
    write(tmp_path / "a.jsonl", json_lines({"text": 7, "body": "b"}))
    message = error_of(tmp_path / "a.jsonl")
    assert message.startswith("data.text_field='text': ")
    assert "a.jsonl:1 holds a int there, not a string; name one of the fields ['body', 'text']" in message


def numbered_files(folder, count):
    for i in range(count):
        write(folder / f"{i}.txt", f"text {i}")
    return open_documents(DataConfig(paths=f"{folder}/*.txt"))


def test_split_is_disjoint_complete_and_of_the_size_asked(tmp_path):
    source = numbered_files(tmp_path, 400)
    train, held_out = split_documents(source, 0.25)
    assert sorted(train.names() + held_out.names()) == source.names()
    assert not set(train.names()) & set(held_out.names())
    assert 70 <= len(held_out) <= 130  # 100 expected, standard deviation 8.7
    assert {d.text for d in held_out} == {f"text {name[:-4]}".encode() for name in held_out.names()}


def test_split_survives_moves_and_new_documents(tmp_path):
    held_out = set(split_documents(numbered_files(tmp_path / "here", 100), 0.2)[1].names())
    elsewhere = numbered_files(tmp_path / "there" / "deeper", 150)
    assert held_out == {name for name in split_documents(elsewhere, 0.2)[1].names() if int(name[:-4]) < 100}
    assert held_out < set(split_documents(elsewhere, 0.3)[1].names())


def test_split_is_the_same_on_every_machine(tmp_path):
    assert split_documents(numbered_files(tmp_path, 12), 0.2)[1].names() == ["1.txt", "7.txt"]


def test_split_with_an_empty_side_is_an_error(tmp_path):
    source = numbered_files(tmp_path, 2)
    for fraction, side in ((1e-9, "held out"), (1 - 1e-9, "left to train on")):
        with pytest.raises(
            ConfigError, match=rf"^data.holdout_fraction=.*none of the 2 documents is {side}; give more"
        ):
            split_documents(source, fraction)


def test_digest_tells_other_documents_apart(tmp_path):
    source = numbered_files(tmp_path, 20)
    train, held_out = split_documents(source, 0.3)
    assert len({source.digest(), train.digest(), held_out.digest()}) == 3
    assert source.digest() == numbered_files(tmp_path, 20).digest()


def test_stdlib_is_plenty_without_third_party_code():
    source = open_documents(DataConfig())
    names = source.names()
    assert len(names) > 500
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py"} <= set(names)
    assert not any("-packages" in name or "__pycache__" in name for name in names)
    assert b"def dumps(" in source[names.index("json/__init__.py")].text


def test_stdlib_files_of_bad_encodings_are_left_out(tmp_path, monkeypatch):
    write(tmp_path / "good.py", "x = 1")
    write(tmp_path / "bad.py", b"# -*- coding: latin-1 -*-\nx = '\xe9'")
    write(tmp_path / "site-packages" / "other.py", "y = 2")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert documents("python-stdlib") == {"good.py": b"x = 1"}
    assert open_documents(DataConfig()).report.counts == {Reason.NOT_UTF8: 1}
