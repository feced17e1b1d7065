"""Texts with hidden needles."""

import re

import numpy as np
import pytest
import tokenizers

from ring_attention.checks import ConfigError
from ring_attention.data.tokenizers import ByteTokenizer, load_tokenizer
from ring_attention.evaluation.needles import (
    NAMES,
    STYLES,
    draw_depths,
    draw_filler,
    draw_length,
    draw_needles,
    hide,
    shortest_text,
    training_document,
)
from ring_attention.evaluation.questions import SLACK, make_questions

LETTERS, DIGITS = STYLES["letters"], STYLES["digits"]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("length", [17, 18, 45, 300])
def test_training_document_of_letters_answers_its_needle(rng, length):
    text = training_document(LETTERS, length, rng)
    assert len(text) == length
    first, last = re.findall(r"key=([A-H][I-P][Q-X])\.", text)
    assert first == last
    assert text.endswith(f"key={last}.")
    filler = text.removesuffix(f"key={last}.").replace(f"key={last}. ", "")
    assert filler in "".join(LETTERS.sentences) * 5
    assert any(filler.startswith(sentence[: len(filler)]) for sentence in LETTERS.sentences)


def test_filler_is_all_sentences_in_turn_from_any_on(rng):
    cycle = "".join(LETTERS.sentences)
    texts = [draw_filler(LETTERS, 500, rng) for _ in range(60)]
    assert {cycle.index(text[:20]) for text in texts} == {cycle.index(sentence) for sentence in LETTERS.sentences}
    assert all(text in cycle * 8 and len(text) >= 500 for text in texts)


def test_a_training_document_of_digits_has_whole_sentences(rng):
    text = training_document(DIGITS, 500, rng)
    (key, again) = re.findall(r"The pass key is ([1-9]\d{4})\.", text)
    assert key == again
    head, question = text.split("What is the pass key? ")
    assert question == f"The pass key is {key}."
    for sentence in (f"The pass key is {key}. Remember it. ", *DIGITS.sentences):
        head = head.replace(sentence, "")
    assert head == ""
    assert 450 < len(text) <= 500


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_draw_needles_gives_names_and_different_keys(rng, style):
    text = training_document(style, 900, rng, needles=5)
    pattern = r"key of the (\w+) is (\d{5})\. R" if style is DIGITS else r"key ([a-z]+)=([A-X]{3})\. "
    found = re.findall(pattern, text)
    assert len(set(dict(found).values())) == len(dict(found)) == 5
    asked = re.search(r"(\w+)(?: is |=)(\w+)\.$", text)
    assert dict(found)[asked[1]] == asked[2]
    assert set(dict(found)) <= set(NAMES)


def test_the_shortest_text_is_the_least_that_a_document_can_be(rng):
    for style, needles in ((LETTERS, 1), (LETTERS, 12), (DIGITS, 1), (DIGITS, 3)):
        least = shortest_text(style, needles)
        assert "key" in training_document(style, least, rng, needles=needles)
        with pytest.raises(ValueError, match=rf"length={least - 1} holds no text of needles={needles}; use at least"):
            training_document(style, least - 1, rng, needles=needles)
    with pytest.raises(ValueError, match="needles=13 must be 1 to 12"):
        draw_needles(LETTERS, 13, rng)


def test_training_document_reaches_both_ends(rng):
    depths = draw_depths(20_000, rng)
    assert (depths.min(), depths.max()) == (0.0, 1.0)
    assert np.mean(depths == 0.0) == pytest.approx(0.05, abs=0.005)
    assert np.mean(depths == 1.0) == pytest.approx(0.05, abs=0.005)
    assert np.mean(depths < 0.5) == pytest.approx(0.5, abs=0.01)


def test_a_needle_lies_at_its_depth(rng):
    (needle,) = draw_needles(LETTERS, 1, rng)
    filler = draw_filler(LETTERS, 400, rng)
    at = lambda depth: hide(LETTERS, [needle], [depth], filler, 400).index(LETTERS.state(needle))  # noqa: E731
    assert [at(0), at(0.25), at(0.5), at(1)] == [0, 100, 200, 400]


def test_lengths_are_mostly_short_and_reach_the_longest(rng):
    draws = np.array([draw_length(20, 8192, rng) for _ in range(20_000)])
    assert draws.min() >= 20
    assert 7000 < draws.max() <= 8192
    for cut in (40, 400):  # the share below it, which the density length**-1.4 has
        want = (20**-0.4 - cut**-0.4) / (20**-0.4 - 8192**-0.4)
        assert abs((draws < cut).mean() - want) < 0.015
        uniform = (cut - 20) / (8192 - 20)
        assert abs(uniform - want) > 0.1, "the control"


def test_make_questions_in_bytes_ends_with_the_answer(rng):
    (question,) = make_questions(LETTERS, ByteTokenizer(), length=203, depth=0.5, needles=1, rng=rng)
    assert (question.tokens.size, question.tokens.dtype, question.answer) == (204, np.int32, 3)
    text = ByteTokenizer().token_bytes(question.tokens).decode()
    assert text[-7:-3] == "key="
    where = text.index(f"key={text[-3:]}. ")
    assert abs(where - 0.5 * (203 - 9 - 7)) <= 1


@pytest.mark.parametrize("start", [(), (7,), (256, 256)])
def test_a_question_begins_with_what_prompts_begin_with(rng, start):
    (question,) = make_questions(LETTERS, ByteTokenizer(), length=203, depth=0.5, needles=1, rng=rng, start=start)
    assert question.tokens[: len(start)].tolist() == list(start)
    assert (question.tokens.size, question.tokens.dtype) == (204, np.int32)
    assert ByteTokenizer().token_bytes(question.tokens[len(start) :])[-7:-3] == b"key="
    assert (question.tokens[len(start) :] < 256).all()


def test_make_questions_asks_for_each_needle_once(rng):
    questions = make_questions(LETTERS, ByteTokenizer(), length=600, depth=0.0, needles=4, rng=rng)
    texts = [ByteTokenizer().token_bytes(question.tokens).decode() for question in questions]
    assert len({text[-7:] for text in texts}) == 4
    for text in texts:
        assert text[: text.index(".")] == text[text.rindex("key ") :]


@pytest.fixture
def byte_level(tmp_path):
    """A tokenizer whose tokens are longer than bytes."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>"])
    model.train_from_iterator(["".join(DIGITS.sentences) + "The pass key is 12345. Remember it. "], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("length", [60, 257, 1000])
def test_make_questions_in_longer_tokens_fills_its_length(byte_level, rng, length):
    for depth in (0.0, 0.4, 1.0):
        (question,) = make_questions(DIGITS, byte_level, length=length, depth=depth, needles=1, rng=rng)
        assert length - SLACK < question.tokens.size - 1 <= length
        text = byte_level.token_bytes(question.tokens).decode()
        assert len(text) > 1.5 * length, "tokens that are longer than bytes"
        key = re.search(r"\d{5}", text)[0]
        assert byte_level.token_bytes(question.tokens[-question.answer :]).decode() == f" {key}"
        assert text.endswith(f"What is the pass key? The pass key is {key}")


def test_a_length_without_room_is_refused(rng):
    tokenizer = ByteTokenizer()
    assert make_questions(LETTERS, tokenizer, length=16, depth=1.0, needles=1, rng=rng)[0].tokens.size == 17
    with pytest.raises(ConfigError, match="length=15: holds no needle and question, which take 16 tokens; give longer"):
        make_questions(LETTERS, tokenizer, length=15, depth=1.0, needles=1, rng=rng)
