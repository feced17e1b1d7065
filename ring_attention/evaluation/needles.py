"""Texts that ask for something said earlier: filler in which needles are hidden, and a question at the end.

The same texts serve training (scripts/make_retrieval_data.py) and measuring (scripts/evaluate.py needle).

Measured with a Transformer of two layers on bytes: long documents alone teach it nothing, since one answer in 8,192
bytes of filler is too faint a signal. Packed documents of 20 to 64 bytes, in which the needle is near, teach it to look
back for the key; going on from there (init_from) with lengths up to 8,192 then carries that to any distance. Hence the
lengths of `draw_length`: mostly short, some as long as it gets.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ring_attention.checks import require

LENGTH_EXPONENT = -1.4
"""The density of the lengths of training documents is proportional to length**LENGTH_EXPONENT."""

EDGE_SHARE = 0.05
"""Share of the needles in training documents that lie at the very beginning, and as many at the very end."""

NAMES = ("ant", "bee", "cat", "cow", "dog", "eel", "elk", "fox", "hen", "owl", "pig", "rat")
"""Names of needles, where a text has several."""


class Needle(NamedTuple):
    """A hidden key, and whose it is; the name is empty where the text has one needle."""

    name: str
    key: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """Wording of filler, needles and questions.

    Attributes:
      sentences: filler is these, again and again.
      alphabets: the characters that may stand at each place of a key.
      owner: what {owner} below becomes where a needle has a {name}; it is empty where there is one needle.
      statement: of a {key}.
      question: all up to the answer.
      answer: of a {key}.
      end: what follows the answer in a training document.
      whole_sentences: filler is cut between sentences alone, for models of language; else anywhere.
    """

    sentences: tuple[str, ...]
    alphabets: tuple[str, ...]
    owner: str
    statement: str
    question: str
    answer: str
    end: str
    whole_sentences: bool

    def state(self, needle: Needle) -> str:
        """Return the sentence that is hidden."""
        return self.statement.format(owner=self._owner_of(needle), key=needle.key)

    def ask(self, needle: Needle) -> str:
        """Return the question, up to the answer."""
        return self.question.format(owner=self._owner_of(needle))

    def answer_of(self, needle: Needle) -> str:
        """Return what a model should continue the question with."""
        return self.answer.format(key=needle.key)

    def _owner_of(self, needle: Needle) -> str:
        return self.owner.format(name=needle.name) if needle.name else ""


STYLES = {
    "letters": Style(
        sentences=(
            "the grass is green. ",
            "the sky is blue. ",
            "the sun is yellow. ",
            "here we go. ",
            "there and back again. ",
        ),
        alphabets=("ABCDEFGH", "IJKLMNOP", "QRSTUVWX"),
        owner=" {name}",
        statement="key{owner}={key}. ",
        question="key{owner}=",
        answer="{key}",
        end=".",
        whole_sentences=False,
    ),
    "digits": Style(
        sentences=(
            "The grass is green. ",
            "The sky is blue. ",
            "The sun is yellow. ",
            "Here we go. ",
            "There and back again. ",
        ),
        alphabets=("123456789", *["0123456789"] * 4),
        owner=" of the {name}",
        statement="The pass key{owner} is {key}. Remember it. ",
        question="What is the pass key{owner}? The pass key{owner} is",
        answer=" {key}",
        end=".",
        whole_sentences=True,
    ),
}
"""letters: short keys that a small model learns in minutes. digits: the pass key test of Mohtashami and Jaggi (2023,
Landmark Attention, section 4.2), for models of language."""


def draw_needles(style: Style, count: int, rng: np.random.Generator) -> list[Needle]:
    """Needles with different keys and, if they are several, different names."""
    require(0 < count <= len(NAMES), f"needles={count} must be 1 to {len(NAMES)}, one for each name; give fewer")
    keys: list[str] = []
    while len(keys) < count:
        key = "".join(letters[rng.integers(len(letters))] for letters in style.alphabets)
        keys += [key] if key not in keys else []
    names = rng.permutation(NAMES).tolist()[:count] if count > 1 else [""]
    return [Needle(name, key) for name, key in zip(names, keys, strict=True)]


def draw_filler(style: Style, size: int, rng: np.random.Generator) -> str:
    """Return the sentences again and again, from a random one on, at least `size` characters."""
    first = rng.integers(len(style.sentences))
    cycle = "".join(style.sentences[first:] + style.sentences[:first])
    return cycle * (size // len(cycle) + 1)


def hide(style: Style, needles: Sequence[Needle], depths: Sequence[float], filler: str, room: int) -> str:
    """Return the first `room` characters of the filler with each needle at its depth: 0 is the beginning, 1 the end."""
    cuts = [int(depth * room) for depth in depths]
    if style.whole_sentences:
        borders = np.array([0, *(i + 2 for i in range(room - 1) if filler[i : i + 2] == ". ")])
        room = int(borders[-1])
        cuts = [int(borders[np.abs(borders - depth * room).argmin()]) for depth in depths]
    pieces, begin = [], 0
    for cut, needle in sorted(zip(cuts, needles, strict=True)):
        pieces += [filler[begin:cut], style.state(needle)]
        begin = cut
    return "".join([*pieces, filler[begin:room]])


def draw_length(shortest: int, longest: int, rng: np.random.Generator) -> int:
    """A length of shortest to longest, its density proportional to length**LENGTH_EXPONENT."""
    power = LENGTH_EXPONENT + 1
    low, high = shortest**power, longest**power
    return int((low + rng.random() * (high - low)) ** (1 / power))


def draw_depths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Depths, uniform but for a share of `EDGE_SHARE` each that is exactly 0 or 1: both are asked for, too."""
    beyond = EDGE_SHARE / (1 - 2 * EDGE_SHARE)
    return rng.uniform(-beyond, 1 + beyond, count).clip(0.0, 1.0)


def training_document(style: Style, length: int, rng: np.random.Generator, *, needles: int = 1) -> str:
    """A text of `length` characters, or up to a sentence less: needles where `draw_depths` says, a question about one.

    Raises:
      ValueError: if it cannot hold the needles and the question.
    """
    hidden = draw_needles(style, needles, rng)
    asked = hidden[rng.integers(needles)]
    question = style.ask(asked) + style.answer_of(asked) + style.end
    room = length - len(question) - sum(len(style.state(needle)) for needle in hidden)
    require(room >= 0, f"length={length} holds no text of needles={needles}; use at least {length - room}")
    return hide(style, hidden, draw_depths(needles, rng), draw_filler(style, room, rng), room) + question


def shortest_text(style: Style, needles: int) -> int:
    """Characters of a training document without filler."""
    hidden = draw_needles(style, needles, np.random.default_rng(0))
    question = style.ask(hidden[0]) + style.answer_of(hidden[0]) + style.end
    return len(question) + sum(len(style.state(needle)) for needle in hidden)
