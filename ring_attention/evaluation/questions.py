"""Needles in tokens: a text of a wanted length that ends with a question, and the tokens of its answer."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ring_attention.checks import require, require_field
from ring_attention.data.tokenizers import Tokenizer
from ring_attention.evaluation.needles import Needle, Style, draw_filler, draw_needles, hide

SLACK = 32
"""Tokens that a text may be shorter than asked for: where a token is not a character, or sentences stay whole."""

_TRIES = 8


class Question(NamedTuple):
    """A text that ends with its answer.

    Attributes:
      tokens: int32 [n], what texts begin with, filler with needles, question and answer.
      answer: how many of the last tokens are the answer's.
    """

    tokens: np.ndarray
    answer: int


def make_questions(
    style: Style,
    tokenizer: Tokenizer,
    *,
    length: int,
    depth: float,
    needles: int,
    rng: np.random.Generator,
    start: Sequence[int] | None = None,
) -> list[Question]:
    """A question about each of `needles` needles: it lies at `depth`, the others anywhere.

    The model reads all tokens of a question but the last, at most `length`, and at most SLACK fewer. The first ones
    are `start`, by default the token that opens a document.

    Raises:
      ConfigError: if the length holds no such text.
    """
    start = [tokenizer.document_start] if start is None else start
    hidden = draw_needles(style, needles, rng)
    filler = draw_filler(style, 16 * length, rng)  # more characters than tokens of any tokenizer
    questions = []
    for asked in hidden:
        depths = [depth if needle is asked else rng.random() for needle in hidden]

        def write(room: int, asked: Needle = asked, depths: list[float] = depths) -> Question:
            return _in_tokens(
                hide(style, hidden, depths, filler, room) + style.ask(asked), style, asked, tokenizer, start
            )

        questions.append(_fit(write, length + 1, len(filler)))
    return questions


def _in_tokens(text: str, style: Style, asked: Needle, tokenizer: Tokenizer, start: Sequence[int]) -> Question:
    """Return the question, whose answer begins where the tokens with it differ from those of the text alone."""
    before, whole = tokenizer.encode(text.encode()), tokenizer.encode((text + style.answer_of(asked)).encode())
    size = min(before.size, whole.size)
    differ = np.flatnonzero(before[:size] != whole[:size])
    first = int(differ[0]) if differ.size else size
    require(first < whole.size, f"the tokenizer has no token for the answer {style.answer_of(asked)!r}; use another")
    tokens = np.concatenate([start, whole]).astype(np.int32)
    return Question(tokens, whole.size - first)


def _fit(write: Callable[[int], Question], most: int, filler: int) -> Question:
    """Return the longest text that was found with at most `most` tokens; write(characters of filler) -> Question."""
    bare = best = write(0)
    need = f"holds no needle and question, which take {bare.tokens.size - 1} tokens"
    require_field(bare.tokens.size <= most, "length", most - 1, need, "give longer --lengths, or fewer needles")
    room = min(most - bare.tokens.size, filler)
    for _ in range(_TRIES):
        question = write(room)
        over = question.tokens.size - most
        if best.tokens.size < question.tokens.size <= most:
            best = question
        if -SLACK < over <= 0:
            break
        characters_per_token = room / max(1, question.tokens.size - bare.tokens.size)
        room = min(max(0, room - math.ceil(over * characters_per_token)), filler)
    return best
