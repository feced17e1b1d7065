"""Rows of short documents are dealt by them in training, by default, and the losses are those of contiguous rows."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.data.loader import TABLE, deal_batches
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.parallel.dealt_rows import DocumentDealing
from ring_attention.training.batches import Corpus, Feed, place
from ring_attention.training.config import AttentionConfig, MeshConfig, OptimizerConfig, TrainConfig
from ring_attention.training.layout_choice import share_of_row, with_layout
from ring_attention.training.state import make_state
from ring_attention.training.step import BATCH_SPEC, make_train_step
from ring_attention.training.validate import validate_config

pytestmark = pytest.mark.usefixtures("plain_kernel")

P, T, ROWS = 4, 128, 4
MODEL = ModelConfig(vocab_size=264, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24)
MESH = dict(dp=2, fsdp=1, sp=P, tp=1)


def config_of(*, model=MODEL, seq_len=T, data=None, **attention):
    return TrainConfig(
        name="documents",
        model=model,
        seq_len=seq_len,
        num_steps=9,
        batch_size=ROWS,
        eval_sequences=ROWS,
        mesh=MeshConfig(dp=2, sp=P),
        attention=AttentionConfig(block_q=8, block_kv=8, **attention),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, accumulation_steps=2),
        data=data or DataConfig(),
    )


def packed_rows(seed: int, count: int) -> list[dict]:
    """Rows of documents of a few tokens to most of a row."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        cuts = np.sort(rng.choice(np.arange(1, T), rng.integers(2, 9), replace=False))
        lengths = np.diff([0, *cuts, T])
        tokens = rng.integers(0, 256, T + 1, np.int32)
        rows.append(
            dict(
                tokens=tokens[:-1],
                targets=tokens[1:],
                positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
                segment_ids=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
                loss_mask=rng.integers(0, 2, T, np.int32),
            )
        )
    return rows


def losses(layout: str, changes=(lambda batch: batch,)) -> list[np.ndarray]:
    """With each change of the batches: three steps, each of two micro-batches over two replicas of a ring."""
    config = config_of(layout=layout)
    mesh, found = ra.make_mesh(**MESH), []
    batches = deal_batches(packed_rows(0, 3 * ROWS), batch_size=ROWS, layout=config.attention.make_dealing(P))
    step = make_train_step(config, mesh)
    for change in changes:
        state, steps = make_state(config, mesh), []
        for batch in batches:
            arrays = place(change(batch), list(range(ROWS)), ROWS, NamedSharding(mesh, BATCH_SPEC))
            state, metrics = step(state, arrays)
            steps.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        found.append(np.array(steps))
    assert step._cache_size() == 1  # one program for all tables
    return found


def stale(batch):
    """A mistake: tables of other rows."""
    return batch | {TABLE: np.roll(batch[TABLE], 1, axis=0)}


def test_losses_are_those_of_contiguous_rows():
    (expected,) = losses("contiguous")
    dealt, mistaken = losses("documents", [lambda batch: batch, stale])
    assert np.abs(dealt / expected - 1).max() <= 1e-5
    assert np.abs(mistaken / expected - 1).max() > 1e-4


def test_dealt_batches_are_rows_in_another_order():
    rows = packed_rows(1, ROWS)
    natural = deal_batches(rows, batch_size=ROWS, layout=ra.SequenceLayout("contiguous", P))[0]
    dealt = deal_batches(rows, batch_size=ROWS, layout=DocumentDealing(ring_size=P))[0]
    layout = ra.DealtRows(dealt.pop(TABLE))
    expected = ra.SequenceLayout.for_documents(natural["segment_ids"], P)
    np.testing.assert_array_equal(layout.table, expected.table)
    assert len({row.tobytes() for row in layout.table}) > 1
    for name, values in natural.items():
        np.testing.assert_array_equal(layout.unpermute(dealt[name]), values, err_msg=name)


def corpus_of(tmp_path, lengths) -> tuple[DataConfig, Corpus]:
    path = tmp_path / f"{sum(lengths)}.jsonl"
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, length))) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(paths=str(path), holdout_fraction=0.2)
    return data, Corpus.open(data)


def test_feed_goes_on_with_the_same_tables(tmp_path):
    data, corpus = corpus_of(tmp_path, [20, 30, 50, 9, 14] * 20)
    config, mesh = config_of(data=data, layout="documents"), ra.make_mesh(**MESH)
    feed = Feed(config, mesh, corpus)
    first = next(feed)[0]
    state = feed.get_state()
    seen = [next(feed)[1] for _ in range(2)]
    again = Feed(config, mesh, corpus)
    again.set_state(json.loads(json.dumps(state)))
    for before in seen:
        after = next(again)[1]
        assert after.keys() == before.keys() >= {TABLE, "tokens"}
        jax.tree.map(np.testing.assert_array_equal, after, before)
    assert first[TABLE].shape == (ROWS, P, 4)
    assert not np.array_equal(first[TABLE], seen[0][TABLE])


def test_auto_deals_by_documents_where_they_are_short_and_all_can_do_it(tmp_path):
    short, long = corpus_of(tmp_path, [10, 20] * 30)[1], corpus_of(tmp_path, [2 * T] * 20)[1]
    assert share_of_row(short, T) < 0.2
    assert share_of_row(long, T) == 1

    def layout(corpus, platform="cpu", mesh=MESH, **changes):
        return with_layout(config_of(**changes), corpus, mesh, platform).attention.layout

    assert layout(short) == "documents"
    assert layout(short, speeds="1 1 2 1") == "documents"
    assert layout(long) == "auto"
    assert layout(short, window=9) == "auto"
    assert layout(short, layout="zigzag") == "zigzag"
    assert layout(short, mesh=MESH | {"sp": 1}) == "auto"
    one_is_local = dataclasses.replace(MODEL, layers=(LayerKind(chunk=8), LayerKind()))
    assert layout(short, model=one_is_local) == "auto"


def test_auto_leaves_no_fused_kernel_for_it(tmp_path):
    """Kernels that must know where runs of keys stand are faster than tiles of XLA, whatever these save."""
    short = corpus_of(tmp_path, [300, 500] * 30)[1]
    model = dataclasses.replace(MODEL, head_dim=128, compute_dtype="bfloat16")
    config = config_of(model=model, seq_len=4096)
    assert with_layout(config, short, MESH, "cpu").attention.layout == "documents"
    assert with_layout(config, short, MESH, "gpu").attention.layout == "auto"
    xla = dataclasses.replace(config, attention=dataclasses.replace(config.attention, impl="xla"))
    assert with_layout(xla, short, MESH, "gpu").attention.layout == "documents"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(layout="documents", seq_len=T + 2), "not divisible by"),
        (dict(layout="documents", speeds="1 1 1"), "ring_size=3, but the mesh axis has 4"),
        (dict(layout="documents", strategy="sparse"), "sparse"),
    ],
    ids=str,
)
def test_what_cannot_be_dealt_is_refused_before_documents_are_read(changes, words):
    with pytest.raises(ConfigError, match=words):
        validate_config(config_of(**changes), MESH, "cpu")


def test_lines_say_how_rows_are_dealt():
    assert AttentionConfig(layout="documents").in_words == "attention by ring, each row dealt by its documents"
    assert AttentionConfig().in_words == "attention by ring, zigzag layout"
    assert AttentionConfig(layout="documents").make_layout(4) == ra.SequenceLayout("zigzag", 4)
