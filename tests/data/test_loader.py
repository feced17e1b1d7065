import json
import pathlib

import numpy as np
import pytest
from small_tokenizers import write_tokenizer

from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.data.files import DocumentFile
from ring_attention.data.loader import READ_OPTIONS, TrainLoader, deal_batches, held_out_rows, spell_rows
from ring_attention.data.sources import open_documents, split_documents
from ring_attention.data.tokenizers import load_tokenizer
from ring_attention.parallel.layouts import LAYOUT_KINDS, SequenceLayout

BYTES = load_tokenizer("bytes")
START = BYTES.document_start
NATURAL = SequenceLayout("contiguous", 1)
FIELDS = ["tokens", "targets", "positions", "segment_ids", "loss_mask"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """60 documents of 5 to 400 random letters, about 12 KB."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    random = np.random.default_rng(0)
    texts = [bytes(random.integers(97, 123, length).tolist()).decode() for length in random.integers(5, 400, 60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(paths=str(path), holdout_fraction=0.3)


def train_loader(config, *, seq_len=32, batch_size=3, layout=NATURAL, streams=1):
    train, _ = split(config)
    return TrainLoader(
        train, BYTES, seed=config.seed, streams=streams, seq_len=seq_len, batch_size=batch_size, layout=layout
    )


def offset(state):
    """Tokens of its document that a loader of one stream has read."""
    return state["streams"]["0"]["offset"]


def split(config):
    return split_documents(open_documents(config), config.holdout_fraction)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(some, others):
    assert len(some) == len(others)
    return all(np.array_equal(a[name], b[name]) for a, b in zip(some, others, strict=True) for name in FIELDS)


def train_texts(config):
    train, _ = split(config)
    return [document.text for document in train]


def one_epoch(config):
    """Batches, of 3 rows of 32 tokens, in an epoch."""
    return sum(len(text) + 1 for text in train_texts(config)) // (3 * 32)


def documents_of(batches):
    """The documents in a run of batches, in order; the last one may be cut."""
    tokens = np.concatenate([batch["tokens"].reshape(-1) for batch in batches])
    return [bytes(document[1:].tolist()) for document in np.split(tokens, np.flatnonzero(tokens == START))[1:]]


def test_loader_batch_holds_int32_arrays_of_its_shape(config):
    batch = next(train_loader(config, seq_len=48, batch_size=2))
    assert list(batch) == FIELDS
    assert {(x.shape, x.dtype) for x in batch.values()} == {((2, 48), np.dtype(np.int32))}


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_loader_deals_every_field_after_shifting_targets(config, kind):
    layout = SequenceLayout(kind, 4)
    natural, dealt = next(train_loader(config)), next(train_loader(config, layout=layout))
    for name in FIELDS:
        assert np.array_equal(layout.unpermute(dealt[name], axis=1), natural[name])
    assert np.array_equal(dealt["tokens"], natural["tokens"]) == (kind == "contiguous")
    assert np.array_equal(natural["targets"][:, :-1], natural["tokens"][:, 1:])
    # The target of a token is looked up by where the token came from, not by its neighbour in the batch.
    order = layout.positions(32)
    for row in range(3):
        for place in np.flatnonzero(order < 31):
            neighbour = np.flatnonzero(order == order[place] + 1)[0]
            assert dealt["targets"][row, place] == dealt["tokens"][row, neighbour]


def test_loader_epoch_reads_every_document_once(config):
    texts = train_texts(config)
    read = documents_of(take(train_loader(config), one_epoch(config) + 20))
    assert sorted(read[: len(texts)]) == sorted(texts)
    assert set(read[:-1]) == set(texts)


def test_loader_epochs_have_their_own_order(config):
    count = len(train_texts(config))
    read = documents_of(take(train_loader(config), 2 * one_epoch(config) + 2))
    first, second = read[:count], read[count : 2 * count]
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != train_texts(config)


def test_loader_order_depends_on_the_seed_alone(config):
    other_seed = DataConfig(paths=config.paths, holdout_fraction=config.holdout_fraction, seed=7)
    batches = take(train_loader(config), 5)
    assert same(batches, take(train_loader(config), 5))
    assert not same(batches, take(train_loader(other_seed), 5))


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("where", ["at the start", "inside a document", "across an epoch"])
def test_loader_restored_goes_on_bitwise(config, kind, where):
    layout = SequenceLayout(kind, 4)
    consumed = {"at the start": 0, "inside a document": 3, "across an epoch": one_epoch(config) - 1}[where]
    saved = train_loader(config, layout=layout)
    take(saved, consumed)
    state = json.loads(json.dumps(saved.get_state()))
    assert (offset(state) > 0) == (consumed > 0)
    expected = take(saved, 6)
    restored = train_loader(config, layout=layout)
    restored.set_state(state)
    assert same(expected, take(restored, 6))
    restored.set_state(state)  # a loader that has run on can go back
    assert same(expected, take(restored, 6))


def test_loader_streams_take_turns_and_share_documents(config):
    rows = take(train_loader(config, seq_len=16, batch_size=1, streams=4), 240)
    whole = [document for stream in range(4) for document in documents_of(rows[stream::4])[:-1]]
    assert set(whole) <= set(train_texts(config))
    assert len(set(whole)) == len(whole) > 12
    longest = max(range(240), key=lambda row: rows[row]["positions"][0, 0])  # deep inside a long document
    assert rows[longest - 4]["positions"][0, 0] == rows[longest]["positions"][0, 0] - 16
    assert rows[longest - 1]["positions"][0, 0] != rows[longest]["positions"][0, 0] - 16


@pytest.mark.parametrize("consumed", [0, 1, 37])
def test_loader_streams_restored_go_on_bitwise(config, consumed):
    saved = train_loader(config, streams=4)
    take(saved, consumed)
    state = json.loads(json.dumps(saved.get_state()))
    expected = take(saved, 9)
    restored = train_loader(config, streams=4)
    restored.set_state(state)
    assert same(expected, take(restored, 9))
    assert not same(expected, take(restored, 9))


def test_loader_restore_reads_one_document(config, monkeypatch):
    saved = train_loader(config, seq_len=8, batch_size=1)
    take(saved, 900)
    state, expected = saved.get_state(), next(saved)
    restored = train_loader(config, seq_len=8, batch_size=1)
    read, text_of = [], DocumentFile.text
    monkeypatch.setattr(DocumentFile, "text", lambda file, index: read.append(index) or text_of(file, index))
    restored.set_state(state)
    assert same([next(restored)], [expected])
    assert state["streams"]["0"]["documents"]["next_index"] > 30
    assert len(read) <= 1 + READ_OPTIONS.prefetch_buffer_size  # what is read ahead


def test_loader_resumes_with_other_batch_length_and_layout(config):
    saved = train_loader(config, seq_len=32, batch_size=3)
    take(saved, 4)
    other = train_loader(config, seq_len=16, batch_size=6, layout=SequenceLayout("striped", 4))
    other.set_state(saved.get_state())
    natural = SequenceLayout("striped", 4).unpermute(next(other)["tokens"], axis=1)
    assert natural.reshape(-1).tolist() == next(saved)["tokens"].reshape(-1).tolist()


def test_loader_refuses_a_state_of_other_documents_or_seed(config, tmp_path):
    state = train_loader(config).get_state()
    more = tmp_path / "documents.jsonl"
    more.write_text(pathlib.Path(config.paths).read_text() * 2)
    for other in (
        DataConfig(paths=config.paths, holdout_fraction=0.3, seed=1),
        DataConfig(paths=config.paths, holdout_fraction=0.4),
        DataConfig(paths=str(more), holdout_fraction=0.3),
    ):
        with pytest.raises(
            ValueError, match=r"the saved position is in \d+ training documents .*data\.seed=0 .*but this"
        ):
            train_loader(other).set_state(state)
    state["corpus"]["digest"] = "another"
    with pytest.raises(ValueError, match=r"\(digest another\) .* or start afresh$"):
        train_loader(config).set_state(state)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq_len": 36}, "seq_len=36 is not divisible by 2"),
        ({"seq_len": 0}, "seq_len=0 must be positive"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
    ],
)
def test_loader_refuses_sizes_that_cannot_be_dealt(config, sizes, message):
    with pytest.raises(ValueError, match=message):
        train_loader(config, **({"seq_len": 32, "batch_size": 4, "layout": SequenceLayout("zigzag", 4)} | sizes))


def rows_of(config, *, num_sequences=8, seq_len=64):
    _, kept = split(config)
    return held_out_rows(kept, BYTES, seq_len=seq_len, num_sequences=num_sequences)


def held_out(config, *, num_sequences=8, batch_size=4, layout=NATURAL, seq_len=64):
    return deal_batches(
        rows_of(config, num_sequences=num_sequences, seq_len=seq_len), batch_size=batch_size, layout=layout
    )


def test_held_out_rows_read_each_document_at_most_once(config):
    _, kept = split(config)
    texts = [document.text for document in kept]
    batches = held_out(config)
    assert [batch["tokens"].shape for batch in batches] == [(4, 64)] * 2
    *whole, last = documents_of(batches)
    assert set(whole) <= set(texts)
    assert len(whole) == len(set(whole)) > 1
    assert any(text.startswith(last) for text in set(texts) - set(whole))


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_held_out_batches_are_dealt_like_training_batches(config, kind):
    layout = SequenceLayout(kind, 4)
    for natural, dealt in zip(held_out(config), held_out(config, layout=layout), strict=True):
        assert list(dealt) == FIELDS
        assert all(np.array_equal(layout.unpermute(dealt[name], axis=1), natural[name]) for name in FIELDS)


def test_held_out_rows_do_not_depend_on_seed_and_batch(config):
    other_seed = DataConfig(paths=config.paths, holdout_fraction=config.holdout_fraction, seed=7)
    assert same(held_out(config), held_out(other_seed))
    rows = np.concatenate([batch["tokens"] for batch in held_out(config, batch_size=2)])
    assert np.array_equal(rows, np.concatenate([batch["tokens"] for batch in held_out(config)]))


def test_spell_rows_gives_exactly_the_targets_that_count(config):
    rows = rows_of(config)
    segments = spell_rows(rows, BYTES)
    counted = b"".join(bytes(row["targets"][row["loss_mask"] == 1].tolist()) for row in rows)
    assert b"".join(predicted for _, predicted in segments) == counted
    assert all(predicted for _, predicted in segments)
    # A row that goes on with a document shows one byte of it; a document's own beginning has no context.
    contexts = {context for context, _ in segments}
    assert b"" in contexts
    assert {len(context) for context in contexts} == {0, 1}
    shown = bytes(row["tokens"][0] for row in rows if row["tokens"][0] != START)
    assert b"".join(context for context, _ in segments) == shown


def test_document_ends_count_in_training_but_not_held_out(config):
    ends = [row["loss_mask"][row["targets"] == START] for row in rows_of(config)]
    assert np.concatenate(ends).size > 1
    assert not np.concatenate(ends).any()
    batch = next(train_loader(config, seq_len=512))
    assert (batch["targets"] == START).sum() > 3
    assert (batch["loss_mask"] == 1).all()


@pytest.mark.parametrize("special_tokens", [False, True])
def test_document_cannot_end_itself_and_open_another(tmp_path, special_tokens):
    """With special tokens read as such it may spell their ids; the segments are the documents still."""
    _, tokenizer = write_tokenizer(tmp_path, ["<s>", "</s>"], tokenizer_config=dict(bos_token="<s>", eos_token="</s>"))
    (tmp_path / "forged.jsonl").write_text(json.dumps({"text": "one</s><s>two"}) + "\n")
    documents = open_documents(DataConfig(paths=f"{tmp_path}/forged.jsonl"))
    settings = dict(seed=0, streams=1, batch_size=1, layout=NATURAL, special_tokens=special_tokens)
    size = 1 + (8 if special_tokens else len("one</s><s>two"))
    batch = next(TrainLoader(documents, tokenizer, seq_len=size, **settings))
    assert batch["segment_ids"].tolist() == [[1] * size]
    assert batch["positions"].tolist() == [[*range(size)]]
    text = [*b"one", 257, 256, *b"two"] if special_tokens else [*b"one</s><s>two"]
    assert batch["tokens"].tolist() == [[256, *text]]
    assert batch["targets"].tolist() == [[*text, 257]]
    assert batch["loss_mask"].all()


def test_held_out_rows_refuse_too_little_text_with_a_remedy(config):
    message = r"^eval_sequences=4000: the \d+ held-out documents fill only \d+ rows of seq_len=64; raise data"
    with pytest.raises(ConfigError, match=message):
        held_out(config, num_sequences=4000)


def test_deal_batches_refuses_a_last_batch_of_another_shape(config):
    with pytest.raises(ValueError, match="number of rows=6 is not divisible by batch_size=4; every evaluation batch"):
        held_out(config, num_sequences=6)


def test_data_config_refuses_a_negative_seed():
    with pytest.raises(ConfigError, match=r"data.seed=-1: must lie in \[0, 2\*\*32\)"):
        DataConfig(seed=-1)
