"""Scoring answers in one pass tells what greedy decoding would say."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import ring_attention as ra
from ring_attention.data.tokenizers import ByteTokenizer
from ring_attention.evaluation.needle_accuracy import AnswerScorer, NeedleTest, measure_needles
from ring_attention.evaluation.needles import STYLES
from ring_attention.evaluation.questions import Question
from ring_attention.inference.generator import Generator
from ring_attention.models import transformer
from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.models.transformer import parameter_specs
from ring_attention.training.config import AttentionConfig, TrainConfig
from ring_attention.training.state import make_state

MODEL = ModelConfig(vocab_size=40, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=24)
CONFIG = TrainConfig(name="x", model=MODEL, seq_len=64, num_steps=200)
KNOWN = 37
"""Tokens that the tokenizer has."""

TEST = NeedleTest(style=STYLES["letters"], lengths=(40, 90), depths=(0.0, 0.5, 1.0), samples=5, needles=2)
MESHES = {"1": dict(sp=1), "8": dict(sp=8), "2x2x2": dict(dp=2, sp=2, tp=2), "fsdp": dict(fsdp=2, sp=4)}


def mesh_of(name):
    return ra.make_mesh(**MESHES[name], devices=jax.devices()[: 1 if name == "1" else 8])


def test_an_oracle_has_every_answer_and_chance_hardly_any():
    rng, sizes = np.random.default_rng(0), []

    def oracle(questions, *, length, rows):
        sizes.append((length, len(questions), rows))
        return [np.ones(question.answer, bool) for question in questions]

    def chance(questions, *, length, rows):
        guesses = [[rng.integers(start, start + 8) for start in b"AIQ"] for _ in questions]
        return [question.tokens[-3:] == guess for question, guess in zip(questions, guesses, strict=True)]

    done = []
    scores = measure_needles(TEST, ByteTokenizer(), oracle, rows_of={40: 7, 90: 30}.get, advance=done.append)
    assert scores.count == 10
    assert scores.answers.shape == (3, 2)
    assert (scores.answers == 1).all()
    assert (scores.tokens == 1).all()
    assert sizes == [*[(40, 7, 7)] * 4, (40, 2, 7), (90, 30, 30)]
    assert sum(done) == 60
    many = dataclasses.replace(TEST, samples=100)
    scores = measure_needles(many, ByteTokenizer(), chance, rows_of=lambda _: 50)
    assert scores.answers.max() < 0.05
    assert abs(scores.tokens - 1 / 8).max() < 0.06


def test_each_cell_knows_its_own_answers():
    def deep_ones(questions, *, length, rows):
        texts = [ByteTokenizer().token_bytes(question.tokens) for question in questions]
        return [np.array([True, text.index(text[-3:]) > 5, True]) for text in texts]

    one = dataclasses.replace(TEST, needles=1)
    scores = measure_needles(one, ByteTokenizer(), deep_ones, rows_of=lambda _: 4)
    assert scores.answers.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert scores.tokens[0] == pytest.approx([2 / 3, 2 / 3])


def test_questions_depend_on_their_cell_and_the_seed_alone():
    read = lambda test, depth: [q.tokens.tolist() for q in test.questions(ByteTokenizer(), 90, depth)]  # noqa: E731
    other = dataclasses.replace(TEST, lengths=(90,), samples=6)
    assert read(other, 1)[:10] == read(TEST, 1)
    assert read(dataclasses.replace(TEST, seed=1), 1) != read(TEST, 1)


@pytest.fixture(scope="module")
def params():
    state = make_state(CONFIG, ra.make_mesh(sp=1, devices=jax.devices()[:1]))
    return jax.device_get(state.params)


def continuations(params, attention, prompts):
    """What greedy decoding continues prompts with, int [prompts, 3]."""
    mesh = ra.make_mesh(sp=1, devices=jax.devices()[:1])
    writer = Generator(MODEL, params, mesh=mesh, capacity=64, attention=attention, vocab_size=KNOWN)
    return np.array(list(writer.generate(prompts, max_new_tokens=3))).T


@pytest.mark.parametrize(
    ("mesh", "attention"),
    [
        ("1", {}),
        pytest.param("8", dict(window=5), marks=pytest.mark.slow),
        pytest.param("2x2x2", dict(strategy="all_gather", layout="striped"), marks=pytest.mark.slow),
        ("fsdp", {}),
    ],
    ids=str,
)
def test_an_answer_is_right_where_greedy_decoding_gives_it(params, mesh, attention):
    attention, mesh = AttentionConfig(**attention), mesh_of(mesh)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(KNOWN, size=size).astype(np.int32) for size in (7, 50, 33, 20)]
    answers = continuations(params, attention, prompts)
    wrong = answers.copy()
    wrong[:, 1] = (wrong[:, 1] + 1) % KNOWN
    tokens = [np.concatenate(pair).astype(np.int32) for pair in zip(prompts * 2, [*answers, *wrong], strict=True)]
    config = dataclasses.replace(CONFIG, attention=attention)
    placed = jax.device_put(params, _shardings(mesh))
    scorer = AnswerScorer(config, placed, mesh=mesh, vocab_size=KNOWN)
    right = scorer.right([Question(t, 3) for t in tokens[:6]], length=53, rows=6 if mesh.shape["sp"] != 8 else 8)
    right += scorer.right([Question(t, 3) for t in tokens[6:]], length=53, rows=6)
    assert all(hits.all() for hits in right[:4])
    assert [hits[:2].tolist() for hits in right[4:]] == [[True, False]] * 4


def _shardings(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(MODEL))


def test_a_window_changes_answers_so_that_the_test_above_sees_it(params):
    prompts = [np.random.default_rng(3).integers(KNOWN, size=50).astype(np.int32)]
    cut, whole = (continuations(params, AttentionConfig(window=window), prompts) for window in (5, 0))
    assert (cut != whole).any()


def test_tokens_that_the_tokenizer_does_not_have_never_count(params):
    mesh = ra.make_mesh(sp=1, devices=jax.devices()[:1])
    loud = params | {"unembed": params["unembed"].copy()}
    loud["unembed"][:, 39] = 100 * (params["unembed"][:, 39] + loud["unembed"][:, :KNOWN].mean(1))
    loud["unembed"][:, 38] = -loud["unembed"][:, 39]  # one of the two is the likeliest, whatever the hidden state
    prompt, chosen = np.arange(20), {}
    questions = [Question(np.append(prompt, token).astype(np.int32), 1) for token in range(40)]
    for size in (KNOWN, 40):
        scorer = AnswerScorer(CONFIG, loud, mesh=mesh, vocab_size=size)
        right = [hits[0] for hits in scorer.right(questions, length=20, rows=40)]
        assert sum(right) == 1
        chosen[size] = right.index(True)
    assert chosen[KNOWN] < KNOWN
    assert chosen[40] >= KNOWN, "the control"


def test_scorer_scales_rotary_by_the_unpadded_length(params, monkeypatch):
    lengths, real = [], transformer.rotary_tables

    def recording(*args, length):
        lengths.append(length)
        return real(*args, length=length)

    monkeypatch.setattr(transformer, "rotary_tables", recording)
    dynamic = RopeConfig(theta=100.0, scaling="dynamic", factor=4.0, original_len=16)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, rope=dynamic))
    scorer = AnswerScorer(config, params, mesh=mesh_of("1"), vocab_size=KNOWN)
    scorer.right([Question(np.arange(20), 3)], length=33, rows=1)  # padded to 34
    assert lengths == [33]
