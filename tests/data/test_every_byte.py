"""From files to batches, at random: every byte of every document ends in exactly one segment, in order and once."""

import collections
import gzip
import itertools
import json
import pathlib
import tempfile

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention.data import loader as loader_module
from ring_attention.data.config import DataConfig
from ring_attention.data.loader import TrainLoader
from ring_attention.data.packing import segments
from ring_attention.data.sources import open_documents
from ring_attention.data.tokenizers import load_tokenizer
from ring_attention.parallel.layouts import LAYOUT_KINDS, SequenceLayout

BYTES = load_tokenizer("bytes")
START = BYTES.document_start

TEXTS = st.one_of(st.text(max_size=12), st.integers(0, 90).map(lambda n: ("abcdefg" * 13)[:n]))
FILES = st.lists(
    st.tuples(st.sampled_from(["txt", "txt.gz", "jsonl", "jsonl.gz"]), st.lists(TEXTS, min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)


@st.composite
def sizes(draw):
    """Arguments of a TrainLoader that fit each other."""
    layout = SequenceLayout(draw(st.sampled_from(LAYOUT_KINDS)), draw(st.integers(1, 4)))
    unit = layout.padded_length(1)
    return dict(
        seed=draw(st.integers(0, 3)),
        streams=draw(st.integers(1, 5)),
        batch_size=draw(st.integers(1, 4)),
        layout=layout,
        seq_len=unit * draw(st.integers(max(1, 8 // unit), 48 // unit)),
    )


@pytest.fixture(scope="module", autouse=True)
def _without_threads():
    """Hypothesis makes hundreds of loaders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "READ_OPTIONS", grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        yield


def write(folder, files):
    """Write the files; return the text of each document by its name, empty ones left out."""
    documents = {}
    for number, (kind, texts) in enumerate(files):
        name = f"{number}.{kind}"
        if kind.startswith("jsonl"):
            content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
            documents |= {f"{name}:{line}": text.encode() for line, text in enumerate(texts, 1) if text}
        else:
            content = "".join(texts).replace("\0", "").lstrip("\ufeff").encode()  # binary files and marks are no text
            documents |= {name: content} if content else {}
        (folder / name).write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    return documents


def read_back(batches, *, layout, streams):
    """The documents of each stream, in order, as the batches spell them; the last of each may be cut.

    Asserts that segments are documents and that positions count within them, from row to row.
    """
    natural = {
        name: layout.unpermute(np.concatenate([batch[name] for batch in batches]), axis=1) for name in batches[0]
    }
    rows = [dict(zip(natural, row, strict=True)) for row in zip(*natural.values(), strict=True)]
    return [_spell(rows[stream::streams]) for stream in range(streams)]


def _spell(rows):
    documents = []
    for row in rows:
        for number, segment in enumerate(segments(row), 1):
            assert set(segment["segment_ids"].tolist()) == {number}
            opens = segment["tokens"] == START
            if opens[0]:
                documents.append(b"")
                segment = {name: values[1:] for name, values in segment.items()}
            assert documents
            assert not opens[1:].any()
            begin = len(documents[-1]) + 1
            assert segment["positions"].tolist() == list(range(begin, begin + len(segment["tokens"])))
            documents[-1] += bytes(segment["tokens"].tolist())
    return documents


def epoch_of(streams, count):
    """Those documents of the streams, dealt out in turn, that are the first `count`."""
    return [document for n, read in enumerate(streams) for document in read[: len(range(n, count, len(streams)))]]


def enough(documents, *, seq_len, streams, batch_size):
    """Batches that hold an epoch of every stream, and the beginning of the next."""
    tokens = sum(len(text) + 1 for text in documents.values())
    return -(-streams * (tokens // seq_len + 2) // batch_size)


def open_loader(folder, **arguments):
    return TrainLoader(open_documents(DataConfig(paths=f"{folder}/*")), BYTES, **arguments)


def check_an_epoch(files, arguments, resume_after):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        documents = write(folder, files)
        if not documents:
            return
        loader, layout = open_loader(folder, **arguments), arguments["layout"]
        streams = min(arguments["streams"], len(documents))
        count = enough(documents, seq_len=arguments["seq_len"], streams=streams, batch_size=arguments["batch_size"])
        batches = []
        for index in range(count + 2):
            if index == min(resume_after, count):
                state = json.loads(json.dumps(loader.get_state()))
            batches.append(next(loader))
        read = epoch_of(read_back(batches, layout=layout, streams=streams), len(documents))
        assert collections.Counter(read) == collections.Counter(documents.values())
        other = open_loader(folder, **arguments)
        other.set_state(state)
        for expected in batches[min(resume_after, count) :]:
            got = next(other)
            assert all(np.array_equal(got[field], expected[field]) for field in expected)


@settings(max_examples=25, deadline=None)
@given(FILES, sizes(), st.integers(0, 40))
def test_epoch_holds_every_byte_once_and_resumes_anywhere(files, arguments, resume_after):
    check_an_epoch(files, arguments, resume_after)


@pytest.mark.slow
@pytest.mark.nightly
@settings(max_examples=200, deadline=None)
@given(FILES, sizes(), st.integers(0, 200))
def test_epoch_holds_every_byte_once_at_length(files, arguments, resume_after):
    check_an_epoch(files, arguments, resume_after)


# --- Controls: the check sees what it is there to see -----------------------------------------------------------------

SIZES = dict(seed=0, streams=2, batch_size=1, layout=SequenceLayout("zigzag", 2), seq_len=8)
TWENTY = [("jsonl", [f"document {n}" for n in range(6)]), ("txt", ["and a file"]), ("txt.gz", ["and another"])]


@pytest.fixture
def epoch(tmp_path):
    """(documents, the batches of more than an epoch)."""
    documents = write(tmp_path, TWENTY)
    loader = open_loader(tmp_path, **SIZES)
    count = enough(documents, seq_len=8, streams=2, batch_size=1)
    return documents, list(itertools.islice(loader, count))


def is_whole(documents, batches):
    try:
        read = epoch_of(read_back(batches, layout=SIZES["layout"], streams=2), len(documents))
    except AssertionError:
        return False
    return collections.Counter(read) == collections.Counter(documents.values())


def test_epoch_check_passes_what_nobody_touched(epoch):
    assert is_whole(*epoch)


@pytest.mark.parametrize("field", ["tokens", "positions", "segment_ids"])
def test_epoch_check_sees_one_wrong_number(epoch, field):
    documents, batches = epoch
    at = int(np.flatnonzero(batches[2]["tokens"][0] != START)[0])
    batches[2][field] = batches[2][field].copy()
    batches[2][field][0, at] += 1
    assert not is_whole(documents, batches)


@pytest.mark.parametrize("damage", [lambda b: b[:2] + b[4:], lambda b: b[:2] + b[:2] + b[2:], lambda b: b[::-1]])
def test_epoch_check_sees_lost_doubled_and_disordered_rows(epoch, damage):
    documents, batches = epoch
    assert not is_whole(documents, damage(batches))
