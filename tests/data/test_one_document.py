"""Where the hash of names leaves a side empty, as with a single text, a document is cut, and its parts are disjoint."""

import gzip
import json

import numpy as np
import pytest

from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.data.loader import TrainLoader, held_out_rows
from ring_attention.data.sources import open_documents, split_documents
from ring_attention.data.tokenizers import load_tokenizer
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.training.batches import Corpus

LINES = "".join(f"line {n} of a book, with words in it: 世界 naïve\n" for n in range(400)).encode()
NO_LINES = ("世界🎈é" * 2000).encode()
BYTES = load_tokenizer("bytes")


def split(folder, fraction):
    return split_documents(open_documents(DataConfig(paths=f"{folder}/*", holdout_fraction=fraction)), fraction)


def texts(source):
    return [source[i].text for i in range(len(source))]


@pytest.mark.parametrize("name", ["book.txt", "input.txt", "other.txt.gz", "a.jsonl"])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("content", [LINES, NO_LINES], ids=["lines", "one line"])
def test_split_holds_out_the_end_of_a_single_document(tmp_path, name, fraction, content):
    stored = json.dumps({"text": content.decode()}).encode() if name == "a.jsonl" else content
    (tmp_path / name).write_bytes(gzip.compress(stored) if name.endswith(".gz") else stored)
    train, held_out = split(tmp_path, fraction)
    (beginning,), (end,) = texts(train), texts(held_out)
    assert beginning + end == content
    assert beginning.decode()
    assert end.decode()
    rest = min(len(beginning), len(end)) / len(content)
    assert rest == pytest.approx(min(fraction, 1 - fraction), rel=0.6, abs=0.006)
    assert content is NO_LINES or beginning.endswith(b"\n")
    assert set(train.names()).isdisjoint(held_out.names())
    assert train.digest() != held_out.digest()
    assert train.report.lines() == held_out.report.lines()
    assert f"the last {len(end):,} bytes are held out" in train.report.lines()[0]


def test_split_is_not_moved_by_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES)
    before = [texts(part) for part in split(tmp_path, 0.1)]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LINES)
    assert [texts(part) for part in split(tmp_path, 0.1)] == before


@pytest.mark.parametrize("fraction", [0.02, 0.98])
def test_split_cuts_the_longest_of_several_documents(tmp_path, fraction):
    for number, size in enumerate([3000, 9000, 2000]):
        (tmp_path / f"{number}.txt").write_bytes(LINES[:size])
    train, held_out = split(tmp_path, fraction)
    small, large = (texts(held_out), texts(train)) if fraction < 0.5 else (texts(train), texts(held_out))
    assert [len(small), len(large)] == [1, 3]
    assert len(small[0]) == pytest.approx(0.02 * 14000, rel=0.5)
    assert (large[0], large[2]) == (LINES[:3000], LINES[:2000])
    assert LINES[:9000] in (large[1] + small[0], small[0] + large[1])


def test_split_never_cuts_with_documents_on_both_sides(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * (100 + number))
    train, held_out = split(tmp_path, 0.3)
    assert sorted(map(len, texts(train) + texts(held_out))) == [100 + number for number in range(40)]
    assert not train.report.lines()


@pytest.mark.parametrize("content", ["x", "世"])
def test_split_refuses_a_document_too_short_to_cut(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ConfigError, match=r"none of the 1 documents is held out; give more documents .*, longer ones"):
        split(tmp_path, 0.05)


def test_digest_changes_with_the_cut_of_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES)
    assert len({part.digest() for fraction in (0.1, 0.2) for part in split(tmp_path, fraction)}) == 4


def test_single_document_trains_each_byte_once_an_epoch(tmp_path):
    (tmp_path / "book.txt").write_bytes(LINES)
    corpus = Corpus.open(DataConfig(paths=f"{tmp_path}/*"))
    assert "held out" in corpus.report.lines()[0]
    layout = SequenceLayout("contiguous", 1)
    sizes = dict(seq_len=64, batch_size=4, layout=layout, seed=0, streams=16)
    loader = TrainLoader(corpus.train, BYTES, **sizes)
    rows = np.concatenate([next(loader)["tokens"] for _ in range(len(corpus.train[0].text) // 256)])
    assert len({row.tobytes() for row in rows}) == len(rows)  # sixteen streams would begin with the same row
    read = b"".join(bytes(token for token in row.tolist() if token < 256) for row in rows)
    assert corpus.train[0].text.startswith(read[:10_000])
    (row,) = held_out_rows(corpus.held_out, BYTES, seq_len=64, num_sequences=1)
    assert bytes(row["tokens"][1:].tolist()) in corpus.held_out[0].text
