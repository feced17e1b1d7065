"""Loss by position: bins, standard errors, and windows."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.data.sources import Document
from ring_attention.data.tokenizers import ByteTokenizer
from ring_attention.evaluation.position_loss import LossReader, bin_edges, long_documents, measure_position_loss
from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.models.transformer import parameter_specs
from ring_attention.training.config import AttentionConfig, TrainConfig
from ring_attention.training.state import make_state
from ring_attention.training.step import make_eval_step

MODEL = ModelConfig(vocab_size=264, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=24)
CONFIG = TrainConfig(name="x", model=MODEL, seq_len=48, num_steps=200)
ALONE = dict(sp=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    state = make_state(CONFIG, ra.make_mesh(**ALONE))
    return jax.device_get(state.params | {"unembed": state.params["unembed"] * 30})


@pytest.fixture(scope="module")
def documents():
    return np.random.default_rng(2).integers(256, size=(3, 46)).astype(np.int32)


def reader(params, mesh, window=0, rope=None):
    placed = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(MODEL)))
    attention = dataclasses.replace(CONFIG.attention, window=window)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, rope=rope or MODEL.rope))
    return LossReader(config, attention, placed, mesh)


@pytest.mark.parametrize(
    ("length", "edges"), [(100, [0, 16, 32, 64, 100]), (64, [0, 16, 32, 64]), (9, [0, 9]), (17, [0, 16, 17])]
)
def test_bins_double_and_end_with_the_document(length, edges):
    assert bin_edges(length).tolist() == edges


def test_means_errors_and_bits_are_those_of_plain_numpy():
    rng = np.random.default_rng(1)
    documents = rng.integers(256, size=(5, 41)).astype(np.int32)
    documents[:, 20] = ByteTokenizer.document_start  # a token of no bytes, the target of position 19
    nats, other = rng.random((2, 5, 40)).astype(np.float32)
    seen = []

    def fake(values):
        def losses(batch, *, rows):
            first = next(i for i in range(5) if (documents[i] == batch[0]).all())
            seen.append((first, len(batch), rows))
            return values[first : first + len(batch)]

        return losses

    loss = measure_position_loss(fake(nats), documents, ByteTokenizer(), rows=2)
    assert seen == [(0, 2, 2), (2, 2, 2), (4, 1, 2)]
    bins = [nats[:, :16], nats[:, 16:32], nats[:, 32:]]
    assert loss.mean() == pytest.approx([part.mean() for part in bins])
    errors = [part.mean(1).std(ddof=1) / math.sqrt(5) for part in bins]
    assert loss.error() == pytest.approx(errors, rel=1e-5)
    assert loss.error() != pytest.approx([part.mean(1).std() / math.sqrt(5) for part in bins], rel=1e-2), "the control"
    num_bytes = [16 * 5, 15 * 5, 8 * 5]
    bits = [part.sum() / n / math.log(2) for part, n in zip(bins, num_bytes, strict=True)]
    assert loss.bits_per_byte() == pytest.approx(bits)
    more, error = measure_position_loss(fake(other), documents, ByteTokenizer(), rows=5).more_than(loss)
    assert more == pytest.approx([(other - nats)[:, a:b].mean() for a, b in ((0, 16), (16, 32), (32, 40))], abs=1e-6)
    pairs = (other - nats)[:, 32:].mean(1)
    assert error[2] == pytest.approx(pairs.std(ddof=1) / math.sqrt(5), rel=1e-4)


def test_one_document_has_no_standard_error():
    losses = lambda batch, *, rows: np.ones((1, 40), np.float32)  # noqa: E731
    loss = measure_position_loss(losses, np.zeros((1, 41), np.int32), ByteTokenizer(), rows=1)
    assert np.isnan(loss.error()).all()
    assert (loss.mean() == 1).all()


def test_long_documents_begin_at_the_beginning():
    texts = [b"short", b"long enough", b"just fits", b"this one is too many"]
    source = [Document(str(i), text) for i, text in enumerate(texts)]
    rows = long_documents(source, ByteTokenizer(), length=9, most=2)
    assert rows.tolist() == [[256, *b"long enou"], [256, *b"just fits"]]
    rows = long_documents(source, ByteTokenizer(), length=9, most=2, start=[])
    assert rows.tolist() == [[*b"long enoug"], [*b"this one i"]]
    with pytest.raises(ConfigError, match="length=20: no document has so many tokens, the longest has 19; use"):
        long_documents(source, ByteTokenizer(), length=20, most=2, start=[])
    assert long_documents(source, ByteTokenizer(), length=4, most=1, start=[7, 8]).tolist() == [[7, 8, *b"sho"]]
    with pytest.raises(ConfigError, match="length=21: no document has so many tokens, the longest has 20; use"):
        long_documents(source, ByteTokenizer(), length=21, most=2)


@pytest.mark.parametrize("mesh", [pytest.param(dict(sp=8), marks=pytest.mark.slow), dict(dp=2, sp=2, tp=2)], ids=str)
def test_reader_gives_the_same_losses_on_any_mesh(params, documents, mesh):
    want = reader(params, ra.make_mesh(**ALONE), window=7).losses(documents, rows=3)
    got = reader(params, ra.make_mesh(**mesh), window=7).losses(documents, rows=4)
    assert got.shape == want.shape == (3, 45)
    assert abs(got - want).max() < 1e-4
    other = reader(params, ra.make_mesh(**ALONE)).losses(documents, rows=3)
    assert abs(other - want).max() > 1e-2, "the control: another window is seen"


def grown_to(length):
    """Dynamic scaling's frequencies at a length, which are those of another theta (as `transformers` has it)."""
    return RopeConfig(theta=100.0 * (4 * length / 16 - 3) ** (6 / (6 - 2)))


def test_reader_scales_rotary_by_the_documents_length(params, documents):
    dynamic = RopeConfig(theta=100.0, scaling="dynamic", factor=4.0, original_len=16)
    ring, alone = reader(params, ra.make_mesh(sp=4, devices=jax.devices()[:4]), rope=dynamic), ra.make_mesh(**ALONE)
    got = ring.losses(documents, rows=3)  # 45 tokens, padded to 48
    want = reader(params, alone, rope=grown_to(45)).losses(documents, rows=3)
    assert abs(got - want).max() < 1e-4
    padded = reader(params, alone, rope=grown_to(48)).losses(documents, rows=3)
    assert abs(padded - want).max() > 1e-2, "the control: three tokens more are seen"
    shorter = reader(params, alone, rope=grown_to(43)).losses(documents[:, :44], rows=3)  # padded to as many
    assert abs(ring.losses(documents[:, :44], rows=3) - shorter).max() < 1e-4


@pytest.mark.slow
def test_reader_cuts_as_attention_window_does(params, documents):
    mesh, documents = ra.make_mesh(**ALONE), documents[:, :45]
    batch = dict(tokens=documents[:, :-1], targets=documents[:, 1:], segment_ids=np.zeros((3, 44), np.int32))
    batch |= dict(positions=np.tile(np.arange(44, dtype=np.int32), (3, 1)), loss_mask=np.ones((3, 44), bool))
    placed = jax.device_put(params)

    def summed(window):
        config = dataclasses.replace(CONFIG, attention=AttentionConfig(window=window))
        return float(make_eval_step(config, mesh)(placed, batch)[0])

    cut, whole = (
        reader(params, mesh, window=7).losses(documents, rows=3),
        reader(params, mesh).losses(documents, rows=3),
    )
    assert cut.sum() == pytest.approx(summed(7), rel=1e-5)
    assert whole.sum() == pytest.approx(summed(0), rel=1e-5)
    assert cut.sum() != pytest.approx(summed(0), rel=1e-4), "the control"
    assert abs(cut - whole)[:, :7].max() < 1e-4, "the window sees all there is so far"
