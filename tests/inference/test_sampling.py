import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_attention.inference.sampling import Sampling, sample

V = 12
LOGITS = np.random.default_rng(1).standard_normal(V).astype(np.float32) * 1.5
DRAWS = 20_000


def _draw(sampling, logits=LOGITS, seeds=None, positions=None):
    seeds = np.arange(DRAWS, dtype=np.uint32) if seeds is None else np.asarray(seeds, np.uint32)
    positions = np.full(len(seeds), 7, np.int32) if positions is None else np.asarray(positions, np.int32)
    rows = jnp.broadcast_to(jnp.asarray(logits), (len(seeds), V))
    return np.asarray(jax.jit(lambda *args: sample(sampling, *args))(rows, seeds, positions))


def _expected(sampling, logits=LOGITS):
    """Probabilities, written down plainly."""
    p = np.exp(logits.astype(np.float64) / sampling.temperature)
    order = np.argsort(-p)
    keep = set(order[: sampling.top_k or V])
    total, made_up, nucleus = sum(p[i] for i in keep), 0.0, set()
    for i in order:
        if i in keep and made_up < sampling.top_p:
            nucleus.add(i)
            made_up += p[i] / total
    return np.array([p[i] if i in nucleus else 0.0 for i in range(V)]) / sum(p[i] for i in nucleus)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=4),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=1.5, top_k=7, top_p=0.6),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.0, top_k=V + 5),
    ],
    ids=str,
)
def test_sample_gives_tokens_as_often_as_it_should(sampling):
    want = _expected(sampling)
    got = np.bincount(_draw(sampling), minlength=V) / DRAWS
    assert not got[want == 0].any()
    noise = np.sqrt(want * (1 - want) / DRAWS)
    assert (np.abs(got - want) <= 4.5 * noise + 1e-9).all()
    other = np.roll(want, 1)  # the control
    assert not (np.abs(got - other) <= 4.5 * np.sqrt(other * (1 - other) / DRAWS) + 1e-9).all()


def test_sample_greedy_and_ties_of_top_k():
    assert (_draw(Sampling()) == LOGITS.argmax()).all()
    level = np.zeros(V, np.float32)
    assert set(_draw(Sampling(temperature=1.0, top_k=2), level)) == set(range(V))


def test_sample_depends_on_its_seed_and_position_alone():
    warm = Sampling(temperature=1.0)
    seeds, positions = np.arange(50) % 10, np.arange(50) // 10
    together = _draw(warm, seeds=seeds, positions=positions)
    alone = [_draw(warm, seeds=[s], positions=[p])[0] for s, p in zip(seeds[:12], positions[:12], strict=True)]
    assert together[:12].tolist() == alone
    by_position = together.reshape(5, 10)
    assert not np.array_equal(by_position[0], by_position[1])
    assert len(set(by_position[0])) > 1


def test_sample_never_gives_tokens_without_a_score():
    logits = np.where(np.arange(V) < 3, 0.0, -np.inf).astype(np.float32)
    for sampling in (Sampling(temperature=3.0), Sampling(temperature=1.0, top_k=8, top_p=0.99)):
        assert set(_draw(sampling, logits)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(temperature=-1), "temperature=-1 must be a number, 0 or more"),
        (dict(temperature=float("nan")), "temperature=nan must be a number"),
        (dict(temperature=float("inf")), "temperature=inf must be a number"),
        (dict(temperature="hot"), "temperature='hot' must be a number"),
        (dict(temperature=1, top_k=-2), "top_k=-2 must be a whole number of tokens"),
        (dict(temperature=1, top_k=1.5), "top_k=1.5 must be a whole number"),
        (dict(temperature=1, top_p=0), "top_p=0 must be more than 0 and at most 1"),
        (dict(temperature=1, top_p=1.1), "top_p=1.1 must be more than 0"),
        (dict(top_k=3, top_p=0.5), "top_k=3 and top_p=0.5 with temperature=0, which takes the likeliest token"),
    ],
    ids=str,
)
def test_sampling_refuses_mistakes_in_one_line(change, words):
    with pytest.raises(ValueError, match=".") as error:
        Sampling(**change)
    assert words in str(error.value)
