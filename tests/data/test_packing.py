import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention.checks import ConfigError
from ring_attention.data.packing import EncodedDocument, PackedRows, encode_document, segments
from ring_attention.data.sources import Document
from ring_attention.data.tokenizers import load_tokenizer

START = 256
FIELDS = ["tokens", "targets", "positions", "segment_ids", "loss_mask"]
TEXTS = st.lists(st.binary(max_size=20), min_size=1, max_size=8)


def packed(texts, seq_len, *, repeat=False, **settings):
    tokenizer = load_tokenizer("bytes")
    documents = grain.MapDataset.source([Document(str(i), text) for i, text in enumerate(texts)])
    documents = documents.repeat() if repeat else documents
    encoded = documents.map(lambda document: encode_document(document, tokenizer, special_tokens=False))
    # No threads: hypothesis makes hundreds of these.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return PackedRows(encoded.to_iter_dataset(options), seq_len=seq_len, **settings)


def stream(texts):
    return [token for text in texts for token in (START, *text)]


def test_packed_row_is_that_worked_out_by_hand():
    first, second = packed([b"ab", b"cdefg", b"hi"], 5)
    a, b, c, d, e, f, g, h = b"abcdefgh"
    assert {name: values.tolist() for name, values in first.items()} == {
        "tokens": [START, a, b, START, c],
        "targets": [a, b, START, c, d],
        "positions": [0, 1, 2, 0, 1],
        "segment_ids": [1, 1, 1, 2, 2],
        "loss_mask": [1, 1, 1, 1, 1],
    }
    assert {name: values.tolist() for name, values in second.items()} == {
        "tokens": [d, e, f, g, START],
        "targets": [e, f, g, START, h],
        "positions": [2, 3, 4, 5, 0],
        "segment_ids": [1, 1, 1, 1, 2],
        "loss_mask": [1, 1, 1, 1, 1],
    }
    without = packed([b"ab", b"cdefg", b"hi"], 5, train_on_end=False)
    assert [row["loss_mask"].tolist() for row in without] == [[1, 1, 0, 1, 1], [1, 1, 1, 0, 1]]


def test_packed_fields_are_int32_of_the_rows_length():
    row = next(iter(packed([b"abc"], 7, repeat=True)))
    assert list(row) == FIELDS
    assert {(values.dtype, values.shape) for values in row.values()} == {(np.dtype(np.int32), (7,))}


@pytest.mark.parametrize("learned", [True, False])
def test_packed_document_has_no_target_after_its_end(learned):
    first, second = packed([b"abc", b"def"], 4, train_on_end=learned)
    assert first["targets"].tolist() == [*b"abc", START]
    assert first["loss_mask"].tolist() == second["loss_mask"].tolist() == [1, 1, 1, int(learned)]
    assert second["segment_ids"].tolist() == [1, 1, 1, 1]


def test_packed_document_does_not_end_where_a_row_cuts_it():
    rows = list(packed([b"abcdefg", b"h"], 4))
    assert [row["targets"].tolist() for row in rows] == [[*b"abcd"], [*b"efg", START]]
    assert all(row["loss_mask"].all() for row in rows)


def test_packed_end_is_its_own_token_where_there_is_one():
    documents = grain.MapDataset.source(
        [EncodedDocument("", np.array([1, *text], np.int32), 2) for text in (b"ab", b"c")]
    )
    (row,) = PackedRows(documents.to_iter_dataset(), seq_len=5)
    assert row["tokens"].tolist() == [1, *b"ab", 1, *b"c"], "it stands in no row"
    assert row["targets"].tolist() == [*b"ab", 2, *b"c", 2]
    assert row["targets"].dtype == np.int32


@given(TEXTS, st.integers(1, 30))
def test_packed_tokens_stand_in_one_row_each_in_order(texts, seq_len):
    rows = list(packed(texts, seq_len))
    tokens = [token for row in rows for token in row["tokens"].tolist()]
    whole = stream(texts)
    assert tokens == whole[: len(tokens)]
    assert len(whole) - len(tokens) < seq_len  # only the incomplete last row is dropped


@given(TEXTS, st.integers(1, 30))
def test_packed_tokens_and_ends_are_targets_exactly_once(texts, seq_len):
    count = -(-2 * len(stream(texts)) // seq_len)  # the rows of two epochs

    def learned(**settings):
        rows = itertools.islice(packed(texts, seq_len, repeat=True, **settings), count)
        return np.concatenate([row["targets"][row["loss_mask"] == 1] for row in rows]).tolist()

    two_epochs = [byte for text in texts * 2 for byte in text]
    assert learned(train_on_end=False)[: len(two_epochs)] == two_epochs
    assert START not in learned(train_on_end=False)
    with_ends = [token for text in texts * 2 for token in (*text, START)]
    assert learned()[: len(with_ends)] == with_ends


@given(TEXTS, st.integers(1, 30))
def test_packed_segments_are_documents_with_own_positions(texts, seq_len):
    rows = list(packed(texts, seq_len))
    tokens = np.concatenate([row["tokens"] for row in rows] or [[]])
    positions = np.concatenate([row["positions"] for row in rows] or [[]])
    expected = [position for text in texts for position in range(len(text) + 1)]
    assert positions.tolist() == expected[: len(positions)]
    assert np.array_equal(positions == 0, tokens == START)
    for row in rows:
        opened = np.cumsum(row["tokens"][1:] == START).tolist()
        assert row["segment_ids"].tolist() == [1, *(1 + n for n in opened)]


@given(TEXTS, st.integers(1, 30))
def test_packed_targets_never_leak_from_another_document(texts, seq_len):
    for learned in (True, False):
        for row in packed(texts, seq_len, train_on_end=learned):
            for segment in segments(row):
                inside = segment["loss_mask"] == 1
                assert inside[:-1].all()
                assert np.array_equal(segment["targets"][:-1], segment["tokens"][1:])
                if not inside[-1]:
                    assert segment["targets"][-1] == START
    for row in packed(texts, seq_len):
        *ended, _ = segments(row)
        assert all(segment["targets"][-1] == START for segment in ended), "and not the next document's first token"


@settings(max_examples=50)
@given(TEXTS, st.integers(1, 12), st.integers(0, 12), st.integers(1, 12))
def test_packed_rows_restore_with_other_row_lengths(texts, seq_len, consumed, next_len):
    saved = iter(packed(texts, seq_len, repeat=True))
    for _ in range(consumed):
        next(saved)
    state = json.loads(json.dumps(saved.get_state()))
    restored = iter(packed(texts, next_len, repeat=True))
    for _ in range(2):
        next(restored)
    restored.set_state(state)
    assert restored.get_state() == state
    endless = itertools.cycle(stream(texts))
    expected = list(itertools.islice(endless, consumed * seq_len, consumed * seq_len + 3 * next_len))
    tokens = [token for row in itertools.islice(restored, 3) for token in row["tokens"].tolist()]
    assert tokens == expected


def test_packed_rows_state_is_small_inside_a_long_document():
    rows = iter(packed([b"x" * 100_000], 100))
    for _ in range(500):
        next(rows)
    assert rows.get_state() == {"documents": {"next_index": 0}, "offset": 50_000, "length": 100_001}


@pytest.mark.parametrize("now", [b"x" * 8, b"x" * 11, b"x"])
def test_packed_rows_refuse_a_document_of_another_length(now):
    saved = iter(packed([b"x" * 10], 6))
    next(saved)
    message = r"^the saved position is token 6 of the 11 in document '0', which has \d+ now; restore the document"
    with pytest.raises(ConfigError, match=message):
        iter(packed([now], 6)).set_state(saved.get_state())
    iter(packed([b"y" * 10], 6)).set_state(saved.get_state())  # what stands in it is not looked at


def test_packed_rows_restore_between_changed_documents():
    saved = iter(packed([b"abc", b"de"], 4))
    next(saved)
    changed = iter(packed([b"ab", b"def"], 4))
    changed.set_state(saved.get_state())
    assert next(changed)["tokens"].tolist() == [START, *b"def"]


def test_segments_cut_every_field_at_the_same_places():
    row = next(iter(packed([b"ab", b"c", b"def"], 8)))
    cut = list(segments(row))
    assert [segment["tokens"].tolist() for segment in cut] == [[START, *b"ab"], [START, *b"c"], [START, *b"de"]]
    for name in FIELDS:
        assert np.array_equal(np.concatenate([segment[name] for segment in cut]), row[name])


def test_packed_rows_refuse_rows_without_length():
    with pytest.raises(ValueError, match="seq_len=0 must be positive"):
        packed([b"abc"], 0)


def test_packed_rows_end_with_the_documents():
    rows = iter(packed([b"abc"], 4))
    next(rows)
    with pytest.raises(StopIteration):
        next(rows)
