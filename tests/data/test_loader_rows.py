"""Processes that each load rows of their own: together they are one process, before and after a restart."""

import json
from unittest import mock

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention.checks import ConfigError
from ring_attention.data import loader as loader_module
from ring_attention.data.loader import TrainLoader, merge_states
from ring_attention.data.sources import Document
from ring_attention.data.tokenizers import load_tokenizer
from ring_attention.parallel.layouts import SequenceLayout

BYTES = load_tokenizer("bytes")
NATURAL = SequenceLayout("contiguous", 1)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_read_ahead():
    """So that what was read is what was asked for, and hypothesis need not start thousands of threads."""
    with mock.patch.object(loader_module, "READ_OPTIONS", grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)):
        yield


class CountingSource:
    """Documents of letters, in memory, that remembers which of them were read."""

    def __init__(self, lengths):
        self._lengths, self.read = list(lengths), set()

    def __len__(self):
        return len(self._lengths)

    def __getitem__(self, index):
        self.read.add(int(index))
        random = np.random.default_rng(int(index))
        return Document(str(index), bytes(random.integers(97, 123, self._lengths[index]).tolist()))

    def digest(self):
        return "in memory"


def train_loader(documents, *, streams=4, batch_size=4, rows=None, seq_len=16, layout=NATURAL, seed=0):
    return TrainLoader(
        documents, BYTES, seed=seed, streams=streams, seq_len=seq_len, batch_size=batch_size, layout=layout, rows=rows
    )


def assert_rows_of(whole, part, rows):
    assert list(whole) == list(part)
    for name, values in part.items():
        assert values.dtype == np.int32
        assert np.array_equal(values, whole[name][rows])


@st.composite
def partitions(draw, batch_size):
    """Rows of 1 to batch_size processes: every row has an owner, some have two, as replicas over tp do."""
    processes = draw(st.integers(1, batch_size))
    owners = [draw(st.integers(0, processes - 1)) for _ in range(batch_size)]
    rows = [{row for row, owner in enumerate(owners) if owner == process} for process in range(processes)]
    return [sorted(mine | draw(st.sets(st.integers(0, batch_size - 1), max_size=1))) for mine in rows if mine]


@st.composite
def restarts(draw):
    """Documents, streams and seq_len, then (batch size, partition, steps) before and after a restart."""
    sizes = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    runs = [(size, draw(partitions(size)), draw(st.integers(0, 4))) for size in sizes]
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))
    return lengths, draw(st.integers(1, 6)), draw(st.integers(1, 20)), runs


@pytest.mark.slow
@settings(deadline=None)
@given(restarts())
def test_rows_of_all_processes_are_the_batch_of_one(drawn):
    lengths, streams, seq_len, runs = drawn
    documents, state = CountingSource(lengths), None
    for batch_size, partition, steps in runs:
        sizes = dict(streams=streams, batch_size=batch_size, seq_len=seq_len)
        one = train_loader(documents, **sizes)
        processes = [train_loader(documents, rows=rows, **sizes) for rows in partition]
        if state is not None:
            for loader in (one, *processes):
                loader.set_state(state)
        for _ in range(steps):
            whole = next(one)
            for rows, process in zip(partition, processes, strict=True):
                assert_rows_of(whole, next(process), rows)
        state = merge_states([json.loads(json.dumps(process.get_state())) for process in processes])
        assert state == one.get_state()


@pytest.mark.parametrize("kind", ["contiguous", "striped", "zigzag"])
def test_rows_come_in_the_order_of_the_layout(kind):
    documents, layout = CountingSource(range(5, 40)), SequenceLayout(kind, 4)
    whole = next(train_loader(documents, layout=layout))
    assert_rows_of(whole, next(train_loader(documents, layout=layout, rows=[1, 2])), [1, 2])
    with pytest.raises(AssertionError):
        assert_rows_of(whole, next(train_loader(documents, layout=layout, rows=[1, 2])), [1, 3])


def read_by(rows, *, batch_size, start=None, steps=6):
    """Which of 200 documents a loader reads in a part of an epoch."""
    documents = CountingSource([30] * 200)
    loader = train_loader(documents, batch_size=batch_size, rows=rows)
    if start is not None:
        loader.set_state(start)
    for _ in range(steps):
        next(loader)
    return documents.read


@pytest.mark.parametrize("batch_size", [4, 8])
def test_rows_never_touch_documents_of_others_streams(batch_size):
    read = [read_by([row], batch_size=batch_size) for row in range(4)]
    assert all(len(mine) > 3 for mine in read)
    assert len(set.union(*read)) == sum(map(len, read))
    # Where a row of the batch comes from every stream in turn, one process has to read them all.
    assert read_by([0], batch_size=3) == read_by(None, batch_size=3)


def test_batch_may_begin_at_any_row_after_a_size_change():
    saved = train_loader(CountingSource([30] * 200), batch_size=3)
    next(saved)  # row 3 is next, so row 0 of the batches to come is from stream 3, row 1 from stream 0
    state = saved.get_state()
    shifted = read_by([0], batch_size=4, start=state)
    assert not shifted & read_by([1], batch_size=4, start=state)
    assert shifted > read_by([3], batch_size=4, steps=2)
    assert not shifted & read_by([0], batch_size=4, steps=2)


def test_set_state_refuses_a_state_without_a_needed_stream():
    documents = CountingSource([30] * 20)
    state = train_loader(documents, rows=[0, 2]).get_state()
    assert list(state["streams"]) == ["0", "2"]
    train_loader(documents, rows=[2]).set_state(state)
    message = r"^the saved position lacks the streams \[1, 3\], which rows \[1, 2, 3\] of batch_size=4 need; merge"
    with pytest.raises(ValueError, match=message):
        train_loader(documents, rows=[1, 2, 3]).set_state(state)


def test_merge_states_refuses_states_of_different_runs():
    def state(*, steps=1, rows=None, seed=0):
        loader = train_loader(CountingSource([30] * 20), rows=rows, seed=seed)
        for _ in range(steps):
            next(loader)
        return loader.get_state()

    assert merge_states([state(rows=[1]), state(rows=[0, 2, 3]), state(rows=[2])]) == state()
    with pytest.raises(ValueError, match=r"^process 1 has next_row=8, but process 0 has 4; save the positions of all"):
        merge_states([state(rows=[0]), state(rows=[1], steps=2)])
    with pytest.raises(ValueError, match=r"^process 2 has corpus=.*'seed': 1.* but process 0 has .*'seed': 0"):
        merge_states([state(), state(), state(seed=1)])
    other = state()
    other["streams"]["3"]["offset"] += 1
    with pytest.raises(ValueError, match=r"^process 1 is at .* in stream 3, but another that reads it is at .*; save"):
        merge_states([state(rows=[3]), other])


@pytest.mark.parametrize("rows", [[], [4], [-1, 0], [1, 0], [2, 2]])
def test_rows_outside_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match=r"^rows=\[.*\] must be some of 0 to 3, each once and ascending; correct"):
        train_loader(CountingSource([30]), rows=rows)


def test_set_state_names_a_document_changed_while_read():
    saved = train_loader(CountingSource([40]), streams=1, batch_size=1)
    next(saved)
    message = "^the saved position is token 16 of the 41 in document '0', which has 6 now; restore the document"
    with pytest.raises(ConfigError, match=message):
        train_loader(CountingSource([5]), streams=1, batch_size=1).set_state(saved.get_state())
