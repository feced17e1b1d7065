"""Each device of each process gets its part of the batch, though a process loads but the rows that its devices hold."""

import collections
import dataclasses
import json
import threading
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small_tokenizers import write_tokenizer

import ring_attention as ra
from ring_attention.data.config import DataConfig
from ring_attention.data.tokenizers import ByteTokenizer
from ring_attention.models.config import ModelConfig
from ring_attention.training import batches as feed_module
from ring_attention.training.batches import Corpus, Feed, _gather, local_rows, place
from ring_attention.training.config import TrainConfig
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.step import BATCH_SPEC

ROWS, TOKENS = 8, 16
MESHES = [dict(fsdp=8), dict(sp=8), dict(dp=2, fsdp=2, sp=2), dict(fsdp=2, tp=4), dict(dp=4, sp=2)]


class SeenByAProcess:
    """A sharding as a process sees it that has some of the devices."""

    def __init__(self, sharding, mine):
        self._sharding, self._mine = sharding, set(mine)

    def addressable_devices_indices_map(self, shape):
        everywhere = self._sharding.devices_indices_map(shape)
        return {device: index for device, index in everywhere.items() if device in self._mine}


def make_parts(shape, sharding, shard):
    """What jax.make_array_from_callback asks a process for: the part of each of its devices."""
    return {device: shard(index) for device, index in sharding.addressable_devices_indices_map(shape).items()}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("deal", ["in a row", "in turn"])
def test_place_gives_every_device_its_part_of_the_batch(monkeypatch, mesh, processes, deal):
    monkeypatch.setattr(jax, "make_array_from_callback", make_parts)
    sharding = NamedSharding(ra.make_mesh(**mesh), BATCH_SPEC)
    devices = sharding.mesh.devices.flatten()
    owners = np.arange(8) * processes // 8 if deal == "in a row" else np.arange(8) % processes
    whole = np.arange(ROWS * TOKENS).reshape(ROWS, TOKENS)
    want = sharding.devices_indices_map(whole.shape)
    parts, loaded = {}, set()
    for process in range(processes):
        mine = SeenByAProcess(sharding, devices[owners == process])
        rows = local_rows(mine, whole.shape)
        assert rows == sorted({row for device in mine._mine for row in whole[want[device]][:, 0] // TOKENS})
        parts |= place({"tokens": whole[rows]}, rows, ROWS, mine)["tokens"]
        loaded |= set(rows)
    assert loaded == set(range(ROWS))
    assert parts.keys() == set(devices)
    assert all(np.array_equal(parts[device], whole[want[device]]) for device in devices)


def gather_together(monkeypatch, states):
    """What `_gather` returns to each of as many processes, which are threads here."""
    here, given = threading.local(), [None] * len(states)
    barrier = threading.Barrier(len(states), timeout=20)

    def process_allgather(x):
        barrier.wait()
        given[here.process] = x
        barrier.wait()
        return np.stack(given)  # like a collective, it needs the same shape of all

    monkeypatch.setattr(jax, "process_count", lambda: len(states))
    monkeypatch.setattr(feed_module, "multihost_utils", types.SimpleNamespace(process_allgather=process_allgather))
    got = [None] * len(states)

    def run(process):
        here.process = process
        got[process] = _gather(states[process])

    threads = [threading.Thread(target=run, args=(process,), daemon=True) for process in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return got


def test_gather_gives_every_process_all_states_of_any_length(monkeypatch):
    states = [{"next_row": 1}, {"streams": {"10": "text, é and all", "2": {}}}, {}]
    assert gather_together(monkeypatch, states) == [states] * 3


@pytest.fixture
def opened(tmp_path):
    """(the folder of the documents, a function that opens a feed of them)."""
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"{number:02}" * 60)
    model = ModelConfig(vocab_size=264, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, ffn_dim=16)
    data = DataConfig(paths=f"{tmp_path}/*.txt", holdout_fraction=0.3, streams=2)
    config = TrainConfig(name="feed", model=model, seq_len=32, num_steps=200, batch_size=4, data=data)

    def open_feed(**changes):
        changed = dataclasses.replace(config, data=dataclasses.replace(data, **changes))
        return Feed(changed, ra.make_mesh(fsdp=2, sp=4), Corpus.open(data))

    return tmp_path, open_feed


def test_feed_gives_rows_and_batch_and_resumes_where_it_was(opened):
    feed = opened[1]()
    next(feed)
    state = feed.get_state()
    rows, batch = next(feed)
    assert feed.rows == [0, 1, 2, 3]
    assert {name: x.tolist() for name, x in batch.items()} == {name: x.tolist() for name, x in rows.items()}
    assert all(x.sharding.spec == BATCH_SPEC for x in batch.values())
    again = opened[1]()
    assert next(again)[0]["tokens"].tolist() != rows["tokens"].tolist()
    again.set_state(state)
    assert next(again)[0]["tokens"].tolist() == rows["tokens"].tolist()


@pytest.mark.parametrize(("changes", "learned"), [({}, True), ({"train_on_end": False}, False)])
def test_feed_learns_document_ends_unless_config_says_not(opened, changes, learned):
    feed = opened[1](**changes)
    batches = [next(feed)[0] for _ in range(10)]
    targets, counts = (np.stack([batch[name] for batch in batches]) for name in ("targets", "loss_mask"))
    assert (targets == ByteTokenizer.document_end).sum() == 10
    assert (counts[targets == ByteTokenizer.document_end] == learned).all()
    assert (counts[targets != ByteTokenizer.document_end] == 1).all()


def test_feed_raises_run_error_where_a_document_changed(opened):
    folder, open_feed = opened
    feed = open_feed()
    for path in folder.iterdir():
        path.write_text("another text")
    with pytest.raises(RunError, match="has changed since it was opened"):
        collections.deque((next(feed) for _ in range(50)), maxlen=0)


CHAT = "<|im_start|>user\nhi<|im_end|>\n"
LINE = "Documents open with <s> (256), and end with </s> (257)."
SPELLED = (
    "Documents spell out special tokens, such as <|im_end|>, <|im_start|>: they are read as text. "
    "--config.data.special_tokens=true reads them as tokens."
)


@pytest.mark.parametrize(
    ("text", "changes", "lines"),
    [
        ("plain", {}, [LINE]),
        (CHAT, {}, [LINE, SPELLED]),
        (CHAT, dict(special_tokens=True), [LINE]),
        (CHAT, dict(tokenizer="bytes"), []),
    ],
)
def test_corpus_says_which_tokens_surround_documents(tmp_path, text, changes, lines):
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    write_tokenizer(tmp_path, special, before=["<s>"], tokenizer_config=dict(eos_token="</s>"))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(20)))
    settings = dict(paths=f"{tmp_path}/texts.jsonl", holdout_fraction=0.5, tokenizer=f"{tmp_path}/tokenizer.json")
    config = DataConfig(**settings | changes)
    assert Corpus.open(config).describe_tokens(config) == lines
