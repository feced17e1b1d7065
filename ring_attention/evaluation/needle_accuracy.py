"""How often a model continues a question with the right answer, by length of the text and depth of the needle.

Greedy decoding gives an answer if and only if each of its tokens has the highest score given the right ones before it.
So a forward pass over question and answer tells, and no token has to be generated.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from ring_attention.checks import require_field
from ring_attention.data.tokenizers import Tokenizer
from ring_attention.evaluation.needles import Style
from ring_attention.evaluation.questions import Question, make_questions
from ring_attention.models.products import GATHERED
from ring_attention.models.transformer import model_builder, parameter_specs
from ring_attention.parallel.mesh import SEQUENCE, TENSOR, compiler_options
from ring_attention.parallel.sharding import spec_of
from ring_attention.training.attend import attention_of
from ring_attention.training.config import TrainConfig
from ring_attention.training.step import BATCH_SPEC

ANSWER_TOKENS = 16
"""Places that are looked at in every text, so that answers of different lengths share a program."""

_ROWS_SPEC = spec_of(("batch",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleTest:
    """Settings of a needle test: how texts are worded, how long they are, where needles lie.

    Attributes:
      style: how texts are worded.
      lengths: tokens that the model reads.
      depths: of the needle that is asked for, 0 to 1.
      samples: texts of each length and depth.
      needles: in each text; each is asked for once.
      seed: of the texts; a cell's depend on its length, the depth's number and this alone.
      start: tokens that a text begins with; None for the one that opens a document.
    """

    style: Style
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    needles: int = 1
    seed: int = 0
    start: tuple[int, ...] | None = None

    def questions(self, tokenizer: Tokenizer, length: int, depth_number: int) -> Iterator[Question]:
        """Those of one cell, `samples * needles` of them."""
        rng = np.random.default_rng([self.seed, length, depth_number])
        settings = dict(length=length, depth=self.depths[depth_number], needles=self.needles, rng=rng, start=self.start)
        for _ in range(self.samples):
            yield from make_questions(self.style, tokenizer, **settings)


class AnswerScorer:
    """Scores answers by which of their tokens a model finds likeliest; a program for each length."""

    def __init__(self, config: TrainConfig, params: Any, *, mesh: Mesh, vocab_size: int):
        """`params` as `TrainedModel.load` gives them; tokens from `vocab_size` on, the tokenizer's, do not count."""
        self._params, self._mesh, self._model = params, mesh, config.model
        self._program_for = functools.cache(functools.partial(make_answer_program, config, mesh, vocab_size))
        self._layout = config.attention.make_layout(mesh.shape[SEQUENCE])

    def right(self, questions: Sequence[Question], *, length: int, rows: int) -> list[np.ndarray]:
        """Bool [answer] of each question: which tokens of its answer greedy decoding gives.

        Args:
          questions: at most `rows`.
          length: tokens that are read, of which those past a question's end are padding: nothing before looks there.
            The rotary scalings "dynamic" and "longrope" go by it, on any mesh.
          rows: of the batch, a multiple of the devices that share it; the last question fills up what is left.
        """
        T = self._layout.padded_length(length)
        tokens_BT, where_BA = np.zeros((rows, T), np.int32), np.zeros((rows, ANSWER_TOKENS), np.int32)
        for row in range(rows):
            tokens, answer = questions[min(row, len(questions) - 1)]
            need = f"has {answer} tokens"
            require_field(answer <= ANSWER_TOKENS, "answer", answer, need, f"use one of at most {ANSWER_TOKENS}")
            tokens_BT[row, : tokens.size - 1] = tokens[:-1]
            where_BA[row, :answer] = np.arange(tokens.size - 1 - answer, tokens.size - 1)
        place_T = np.argsort(self._layout.positions(T)).astype(np.int32)  # of a position, in the layout's order
        sharded = jax.device_put(self._layout.permute(tokens_BT, 1), NamedSharding(self._mesh, BATCH_SPEC))
        program = self._program_for(self._model.scaled_length(length))
        chosen_BA = program(
            self._params, sharded, jax.device_put(place_T[where_BA], NamedSharding(self._mesh, _ROWS_SPEC))
        )
        chosen_BA = np.asarray(chosen_BA)
        return [row[: q.answer] == q.tokens[-q.answer :] for row, q in zip(chosen_BA, questions, strict=False)]


def make_answer_program(config: TrainConfig, mesh: Mesh, vocab_size: int, length: int):
    """choose(params, tokens int32 [B,T], places int32 [B,A]) -> int32 [B,A], compiled for `mesh`.

    The likeliest token below `vocab_size` after each place; tokens and places are in the layout's order. Scores are
    made of these places alone. The rotary scalings "dynamic" and "longrope" go by `length`.
    """
    build, P = model_builder(config.transformer), mesh.shape[SEQUENCE]
    attend, layout = attention_of(config.attention, config.transformer, P), config.attention.make_layout(P)

    def on_device(params, tokens_bt, places_bA):
        (b, t), me, model = tokens_bt.shape, lax.axis_index(SEQUENCE), build(params)
        positions_bt = jnp.broadcast_to(layout.shard_positions(me, t), (b, t))
        hidden_btM = model.hidden(tokens_bt, positions=positions_bt, segment_ids=None, attend=attend, length=length)
        found_bAM = jnp.take_along_axis(hidden_btM, (places_bA % t)[..., None], axis=1)
        mine_bA = places_bA // t == me
        hidden_bAM = lax.psum(jnp.where(mine_bA[..., None], found_bAM, 0), SEQUENCE)
        scores_bAv = model.logits_of(hidden_bAM, GATHERED)
        scores_bAV = lax.all_gather(scores_bAv, TENSOR, axis=2, tiled=True, to="invarying")
        known_V = jnp.arange(scores_bAV.shape[2]) < vocab_size
        chosen_bA = jnp.where(known_V, scores_bAV, -jnp.inf).argmax(-1).astype(jnp.int32)
        return lax.pmax(chosen_bA, SEQUENCE)  # alike on all, which the type does not know

    specs = (parameter_specs(config.transformer), BATCH_SPEC, _ROWS_SPEC)
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=_ROWS_SPEC)
    return jax.jit(sharded, compiler_options=compiler_options(mesh))


@dataclasses.dataclass(frozen=True)
class NeedleScores:
    """Shares in [0, 1], float64 [depths, lengths].

    Attributes:
      answers: answers that are right as a whole.
      tokens: tokens that are right, given the right ones before them.
      count: answers behind each number.
    """

    answers: np.ndarray
    tokens: np.ndarray
    count: int


def measure_needles(
    test: NeedleTest,
    tokenizer: Tokenizer,
    right: Callable[..., list[np.ndarray]],
    *,
    rows_of: Callable[[int], int],
    advance: Callable[[int], None] = lambda done: None,
) -> NeedleScores:
    """Ask all questions.

    Args:
      test: which.
      tokenizer: the model's.
      right: as `AnswerScorer.right`.
      rows_of: of a length, how many texts are read at once.
      advance: called with how many questions were answered.
    """
    shape = (len(test.depths), len(test.lengths))
    answers, tokens = np.zeros(shape), np.zeros(shape)
    for column, length in enumerate(test.lengths):
        cells: list[list[np.ndarray]] = [[] for _ in test.depths]
        for batch in _batched(_questions(test, tokenizer, length), rows_of(length)):
            hits = right([question for _, question in batch], length=length, rows=rows_of(length))
            for (depth_number, _), tokens_right in zip(batch, hits, strict=True):
                cells[depth_number].append(tokens_right)
            advance(len(batch))
        answers[:, column] = [np.mean([hit.all() for hit in cell]) for cell in cells]
        tokens[:, column] = [np.concatenate(cell).mean() for cell in cells]
    return NeedleScores(answers, tokens, test.samples * test.needles)


def _questions(test: NeedleTest, tokenizer: Tokenizer, length: int) -> Iterator[tuple[int, Question]]:
    """(number of the depth, question) of all questions of a length."""
    for depth_number in range(len(test.depths)):
        for question in test.questions(tokenizer, length, depth_number):
            yield depth_number, question


def _batched(values: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` values, the last of what is left."""
    values = iter(values)
    while batch := list(itertools.islice(values, size)):
        yield batch
