import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention.data.config import DataConfig
from ring_attention.data.sources import open_documents, split_documents
from ring_attention.evaluation import byte_models, report
from ring_attention.evaluation.byte_models import ByteModel
from ring_attention.training.batches import Corpus


def slow_probability(documents, context, byte, order):
    """Witten-Bell, as the formula reads: the oracle."""
    if order < 0:
        return 1 / 256
    if order > len(context):
        return slow_probability(documents, context, byte, order - 1)
    history = context[len(context) - order :]
    followers = [d[i + order] for d in documents for i in range(len(d) - order) if d[i : i + order] == history]
    lower = slow_probability(documents, context, byte, order - 1)
    if not followers:
        return lower
    kinds = len(set(followers))
    return (followers.count(byte) + kinds * lower) / (len(followers) + kinds)


def slow_bits(documents, context, predicted, order):
    text = context + predicted
    return [-math.log2(slow_probability(documents, text[:i], text[i], order)) for i in range(len(context), len(text))]


# A small alphabet with both ends of the byte range, so that contexts repeat and codes may overflow.
TEXT = st.lists(st.sampled_from([0, 97, 98, 255]), max_size=12).map(bytes)
CORPUS = st.lists(TEXT, max_size=4)


@settings(max_examples=25, deadline=None)
@given(CORPUS, st.lists(st.tuples(TEXT.map(lambda t: t[:1]), TEXT), min_size=1, max_size=3), st.integers(0, 2))
def test_bits_are_those_of_the_slow_formula(documents, segments, order):
    model = ByteModel.fit(documents, order)
    expected = [slow_bits(documents, context, predicted, order) for context, predicted in segments]
    for (context, predicted), bits in zip(segments, expected, strict=True):
        np.testing.assert_allclose(model.bits(context, predicted), bits, rtol=1e-12)
    total = sum(map(len, expected))
    if total:
        np.testing.assert_allclose(model.bits_per_byte(segments), sum(map(sum, expected)) / total, rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"a", b"ab", b"ba", b"xyzab", b"\xff\xff", b"\x00\x00"])
def test_probabilities_sum_to_one_and_agree_with_bits(context):
    model = ByteModel.fit([b"abracadabra", b"\xff\xff\xff\x00", b""])
    p = model.distribution(context)
    assert p.shape == (256,)
    assert p.min() > 0
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    bits = [model.bits(context, bytes([byte]))[0] for byte in range(256)]
    np.testing.assert_allclose(-np.log2(p), bits, rtol=1e-12)


def test_documents_are_not_joined():
    model = ByteModel.fit([b"ab", b"ab"], order=1)
    np.testing.assert_array_equal(model.distribution(b"b"), model.distribution(b""))  # nothing ever followed b
    joined = ByteModel.fit([b"abab"], order=1)
    assert joined.distribution(b"b")[ord("a")] > 1.5 * joined.distribution(b"")[ord("a")]


def test_a_segment_starts_anew_and_only_predicted_bytes_count():
    model = ByteModel.fit([b"abcabcabc"])
    alone = [model.bits(b"", b"abc"), model.bits(b"c", b"ab")]
    together = model.bits_per_byte([(b"", b"abc"), (b"c", b"ab"), (b"a", b"")])
    np.testing.assert_allclose(together, np.concatenate(alone).mean())
    assert model.bits(b"c", b"a")[0] < model.bits(b"", b"a")[0]  # one byte of context helps


def test_a_lower_order_can_be_asked_of_the_same_counts():
    documents, segments = [b"abracadabra", b"banana"], [(b"", b"cabana"), (b"b", b"anda")]
    model = ByteModel.fit(documents, 2)
    for order in range(3):
        expected = ByteModel.fit(documents, order).bits_per_byte(segments)
        assert model.bits_per_byte(segments, order=order) == expected
    assert model.bits_per_byte(segments) == model.bits_per_byte(segments, order=2)


def test_counting_in_chunks_counts_the_same(monkeypatch):
    documents = [bytes(np.random.default_rng(i).integers(0, 4, 50).tolist()) for i in range(20)]
    segments = [(b"", bytes([0, 1, 2, 3, 3, 2, 9]))]
    whole = ByteModel.fit(documents).bits_per_byte(segments)
    monkeypatch.setattr(byte_models, "BYTES_PER_CHUNK", 120)
    assert ByteModel.fit(documents).bits_per_byte(segments) == whole


def test_without_documents_every_byte_costs_eight_bits():
    assert ByteModel.fit([]).bits_per_byte([(b"", b"anything")]) == 8


def test_each_order_beats_the_one_below_on_held_out_python():
    train, held_out = split_documents(open_documents(DataConfig()), 0.05)
    model = ByteModel.fit(document.text for document in train)
    segments = [(b"", document.text) for document in held_out]
    zero, one, two = (model.bits_per_byte(segments, order=order) for order in range(3))
    assert 2 < two < one - 0.5
    assert one < zero - 0.5
    assert zero < 6


def test_byte_references_do_not_read_all_of_a_large_corpus(tmp_path, monkeypatch):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("abcd" * 25)
    corpus = Corpus.open(DataConfig(paths=f"{tmp_path}/*", holdout_fraction=0.3))
    fitted, fit = [], ByteModel.fit
    monkeypatch.setattr(ByteModel, "fit", lambda texts: fit(fitted.append(text) or text for text in texts))
    monkeypatch.setattr(report, "FITTED_BYTES", 450)
    references = report.byte_references(corpus, SimpleNamespace(segments=[(b"", b"abcd")]))
    assert len(fitted) == 5
    assert sorted(references) == ["byte model, order 0", "byte model, order 1", "byte model, order 2"]


@pytest.mark.parametrize("order", [-1, 3])
def test_bits_per_byte_refuses_orders_not_fitted(order):
    with pytest.raises(ValueError, match=f"order={order} is not supported; choose 0, 1 or 2"):
        ByteModel.fit([b"a"], order)
    with pytest.raises(ValueError, match=f"order={order} was not fitted; choose one below 2"):
        ByteModel.fit([b"a"], 1).bits(b"", b"a", order=order)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match="there is no byte to predict; give held-out segments"):
        ByteModel.fit([b"a"]).bits_per_byte([(b"a", b"")])
