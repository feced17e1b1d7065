"""Files from strangers, drawn at random: each gives documents or one line, soon, and nothing that is no file is opened.

The seed of each is in the test's name and in the message of a failure.
"""

import contextlib
import gzip
import json
import os
import random
import signal
import socket

import pytest

from ring_attention.checks import ConfigError
from ring_attention.data import reading
from ring_attention.data.config import DataConfig
from ring_attention.data.sources import open_documents, split_documents

NAMES = (
    *("a.txt", "b.TXT.gz", "c.jsonl", "d.jsonl.gz", "e.json", "f.json.gz", "g.ndjson", "h", "i.jsonl.zst", "j.md.GZ"),
    *("two\nlines.txt", "tab\t\x1b[31m.jsonl", "x" * 250 + ".txt", "é\u2028.json", " .txt", "-rf.txt", "a,b.txt"),
    *(os.fsdecode(b"caf\xe9.jsonl"), "[a].txt", "*.txt", "~.jsonl", "$HOME.txt", "\u202etxt.json", ".hidden.txt"),
)
VALUES = (
    *(
        "null",
        "true",
        "7",
        "-1",
        "1e999",
        "-0",
        "NaN",
        "Infinity",
        "9" * 5000,
        "1" + "0" * 4000,
        '"a text"',
        '""',
        "[]",
    ),
    *("{}", '["a"]', '{"text": "a"}', r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', '"' + "x" * 3000 + '"', '"\u2028"'),
    *("[" * 3000, '{"a":' * 3000, "[" * 900 + "]" * 900, '"unfinished', '"\x01"', "'a'", "undefined", r'"\x"', "00"),
)
KEYS = ("text", "text", "text", "Text", "", "text\\u0000", "a" * 700, "\\ud800", "\u2028", "text")


def random_text(draw):
    alphabet = draw.choice(["ab \n", "é世🎈\u2028\ufeff\r\n", '{}[]":,\\ \n', "".join(map(chr, range(1, 128)))])
    return "".join(draw.choices(alphabet, k=draw.choice([0, 1, 3, 200, 5000]))).encode()


def random_line(draw):
    fields = (f'"{draw.choice(KEYS)}": {draw.choice(VALUES)}' for _ in range(draw.choice([0, 1, 1, 1, 2, 4])))
    line = "{" + ", ".join(fields) + "}"
    return draw.choice([line, line, line, draw.choice(VALUES), line[: len(line) // 2], "\ufeff" + line]).encode()


def random_lines(draw):
    end = draw.choice([b"\n", b"\n", b"\r\n", b"\r", b"\n\n", "\u2028".encode()])
    return end.join(random_line(draw) for _ in range(draw.choice([0, 1, 2, 5])))


def random_content(draw):
    """Bytes that are often nearly right."""
    content = draw.choice(
        [random_text, random_lines, random_lines, lambda d: d.randbytes(d.choice([0, 1, 2, 50, 4000]))]
    )
    content = content(draw)
    if draw.random() < 0.2:
        marks = (
            b"\xef\xbb\xbf",
            b"\xff\xfe",
            b"\xfe\xff",
            b"\0",
            b"\x28\xb5\x2f\xfd",
            b"\x1f\x8b\x08",
            b"PK\x03\x04",
            b"[",
        )
        content = draw.choice(marks) + content
    if draw.random() < 0.1:
        content = content.decode(errors="replace").encode(
            draw.choice(["utf-16", "utf-32-be", "utf-7"]), "surrogatepass"
        )
    if draw.random() < 0.1 and content:
        at = draw.randrange(len(content))
        content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    return content


def zipped(content, draw):
    """A gzip archive, now and then a damaged one, or several strung together."""
    archive = gzip.compress(content, 1, mtime=0) + draw.choice(
        [b"", b"", b"", gzip.compress(content, mtime=0), b"\0\0", b"garbage"]
    )
    damage = draw.choice([None, None, None, "cut", "flip", "swollen"])
    if damage == "cut":
        return archive[: draw.randrange(len(archive))]
    if damage == "flip":
        at = draw.randrange(len(archive))
        return archive[:at] + bytes([archive[at] ^ (1 << draw.randrange(8))]) + archive[at + 1 :]
    return gzip.compress(b" " * 2_000_000, 1) if damage == "swollen" else archive


def place(path, draw):
    """Put something at `path`: most often a file."""
    kind = draw.choice(
        ["file"] * 12 + ["folder", "pipe", "socket", "device", "broken", "itself", "up", "unlinked file"]
    )
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):  # some names are too long
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to(draw.choice(["/dev/zero", "/dev/urandom", "/dev/tty", "/dev/stdin"]))
    elif kind in ("broken", "itself", "up"):
        path.symlink_to({"broken": "nothing", "itself": path.name, "up": ".."}[kind])
    else:
        content = random_content(draw)
        path.write_bytes(
            zipped(content, draw) if path.name.lower().endswith(".gz") and draw.random() < 0.9 else content
        )


def outcome(config):
    """Read all documents: their number, or the line that refuses them."""
    try:
        source = open_documents(config)
        for part in split_documents(source, config.holdout_fraction):
            for index in range(len(part)):
                document = part[index]
                assert document.text, document.name
                assert document.text.decode()
        assert open_documents(config).digest() == source.digest()
        return len(source)
    except ConfigError as error:
        return str(error)


def check(folder, seed):
    """Draw a folder by its seed; return how reading it ended."""
    draw = random.Random(seed)
    index, folder = folder / "index", folder / "alone" / "corpus"  # links upwards lead to no other corpus
    folder.mkdir(parents=True)
    for name in draw.sample(NAMES, draw.choice([1, 1, 2, 6])):
        place(folder / name, draw)
    config = DataConfig(
        paths=f"{folder}/{draw.choice(['*'] * 4 + ['**', '**/*', '**/*.[tj]*', '.*'])}",
        bad_documents=draw.choice(["refuse", "skip"]),
        max_document_bytes=draw.choice([1, 100, 10_000, 2**20, 2**20, 2**20]),
        holdout_fraction=draw.choice([0.05, 0.3, 0.5, 0.999]),
        index_dir=draw.choice(["", str(index)]),
    )
    end = outcome(config)
    if isinstance(end, str):
        assert end.isprintable(), f"seed {seed}: {end!r}"
        assert end.startswith("data."), f"seed {seed}: {end}"
        assert len(end) < 2000, f"seed {seed}: {len(end)} characters"
    return end


@pytest.mark.parametrize(
    "seeds", [range(start, start + 50) for start in range(0, 500, 50)], ids=lambda s: f"{s.start}+"
)
def test_hostile_documents_are_read_or_refused_in_a_line(tmp_path, seeds, in_time, monkeypatch):
    opened, open_really = [], reading._open
    monkeypatch.setattr(reading, "_open", lambda path: opened.append(path) or open_really(path))
    ends = []
    for seed in seeds:
        try:
            ends.append(check(tmp_path / str(seed), seed))
        except BaseException:
            print(f"seed {seed}")
            raise
    assert all(os.path.isfile(path) for path in opened)
    assert any(isinstance(end, int) for end in ends)  # the draw is neither all bad nor all good
    assert any(isinstance(end, str) for end in ends)


def test_hostile_line_spoils_no_other(tmp_path):
    draw = random.Random(7)
    hostile = [random_line(draw).replace(b"\n", b" ") for _ in range(400)]
    good = [json.dumps({"text": f"good {n}"}).encode() for n in range(400)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for pair in zip(good, hostile, strict=True) for line in pair))
    source = open_documents(DataConfig(paths=f"{tmp_path}/*", bad_documents="skip"))
    texts = [source[i].text.decode() for i in range(len(source))]
    assert [text for text in texts if text.startswith("good ")] == [f"good {n}" for n in range(400)]
    assert source.report.total + len(source) == 800
    assert source.report.total > 100


def test_alarm_sees_a_pipe_that_is_opened(tmp_path, in_time):
    os.mkfifo(tmp_path / "pipe")
    signal.alarm(1)
    with pytest.raises(pytest.fail.Exception, match="no answer"):
        open(tmp_path / "pipe", "rb").close()
