"""What is predicted of packed documents, against what can be worked out by hand."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from small_tokenizers import write_tokenizer

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.hardware.topology import find_topology
from ring_attention.parallel.dealing import deal_documents
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.strategies import find_strategy
from ring_attention.parallel.workload import BACK, HOP, Workload
from ring_attention.planning.balance import balance_of, hops_needed, tiles_by_hop, work_by_hop
from ring_attention.planning.dealing import compare_layouts
from ring_attention.planning.dealing_report import dealing_json, dealing_table
from ring_attention.planning.documents import ASSUMED_BYTES, DocumentLengths
from ring_attention.planning.plan import make_plan
from ring_attention.planning.simulator import Machine, simulate
from ring_attention.training.flags import parse_config

P, T, N = 4, 512, 4
ROWS = [np.array([100, 12, 200, 200]), np.array([512]), np.array([1, 300, 211])]
DEALT = DealtRows(np.stack([deal_documents(row, P, N) for row in ROWS]))
SEGMENTS = np.stack([np.repeat(np.arange(len(row)), row) for row in ROWS])


def _dense(rows, tile=1):
    """The pairs of dealt rows, or their tiles, from the whole mask: [P, P]."""
    layout = DealtRows(DEALT.table[rows])
    positions, segments = layout.positions(T), layout.permute(SEGMENTS[rows], 1)
    sees = (positions[:, :, None] >= positions[:, None, :]) & (segments[:, :, None] == segments[:, None, :])
    tiles = sees.reshape(len(rows), T // tile, tile, T // tile, tile).any((2, 4))
    pairs = tiles.reshape(len(rows), P, T // tile // P, P, T // tile // P).sum((0, 2, 4))
    return np.array([[pairs[i, (i - hop) % P] for hop in range(P)] for i in range(P)])


def test_work_by_hop_and_tiles_by_hop_of_dealt_rows_are_those_of_the_dense_mask():
    for rows in ([0], [1], [0, 1, 2]):
        layout, segments = DealtRows(DEALT.table[rows]), SEGMENTS[rows]
        work = work_by_hop(layout, T, segment_ids=layout.permute(segments, 1))
        np.testing.assert_array_equal(work, _dense(rows))
        for tile in (1, 4, 32):
            lengths = [ROWS[row] for row in rows]
            np.testing.assert_array_equal(tiles_by_hop(layout, lengths, tile), _dense(rows, tile))
    np.testing.assert_array_equal(work_by_hop(DealtRows(DEALT.table[[1]]), T), _dense([1]))  # one document
    assert not np.array_equal(_dense([0], 4), _dense([0], 8))


def test_tiles_by_hop_of_static_layouts_keep_rows_apart():
    lengths = [ROWS[0], ROWS[2]]
    layout = ra.SequenceLayout("zigzag", P)
    one_by_one = sum(tiles_by_hop(layout, [row], 4) for row in lengths)
    np.testing.assert_array_equal(tiles_by_hop(layout, lengths, 4), one_by_one)


def test_hops_needed_are_the_fewest_and_rather_forth():
    work = np.zeros((8, 8), int)
    assert hops_needed(work) == (0, 0)
    for seen, want in (([1], (1, 0)), ([7], (0, 1)), ([1, 6], (1, 2)), ([1, 2, 5, 6], (2, 3)), ([4], (4, 0))):
        work[:] = 0
        work[3, seen] = 1
        assert hops_needed(work) == want


def test_dealing_evens_the_work_that_zigzag_does_not():
    rng = np.random.default_rng(0)
    lengths = np.diff(np.sort(rng.choice(np.arange(1, 4096), 7, replace=False)), prepend=0, append=4096)
    segments = np.repeat(np.arange(8), lengths)[None]
    zigzag, dealt = ra.SequenceLayout("zigzag", 8), DealtRows(deal_documents(lengths, 8, 16)[None])
    before, after = (work_by_hop(x, 4096, segment_ids=x.permute(segments, 1)) for x in (zigzag, dealt))
    assert before.sum() == after.sum()
    assert balance_of(after).total <= 1.05 < 1.2 < balance_of(before).total
    forth, back = dealt.hops(segments)[0]
    assert hops_needed(after) == (forth, back)


@pytest.mark.parametrize("backward", [False, True])
def test_ring_of_counted_hops_sends_and_computes_what_its_hops_say(backward):
    work = Workload(seq_len=8 * 64, devices=8, heads=4, kv_heads=2, head_dim=8, segments=True)
    ring, keys = find_strategy("ring"), 2 * work.bytes_of(64, 2) + 4 * 64
    gradients = 2 * work.bytes_of(64, 2, 4) * backward
    for forth, back in ((0, 0), (1, 0), (0, 1), (3, 2), (7, 0)):
        counted = dataclasses.replace(work, hops=(forth, back))
        steps = ring.schedule(counted, backward).steps
        met = [step.hops.start for step in steps if step.hops]
        assert sorted(met) == sorted([0, *range(1, forth + 1), *(8 - hop for hop in range(1, back + 1))])
        home = [1 if hops == 7 else hops.bit_count() for hops in (forth, back)]  # one more hop comes full circle
        returns = sum(max(hops - 1, 0) for hops in (forth, back)) + sum(home)
        assert ring.sent_bytes(counted, backward) == keys * (forth + back) + gradients * returns
        ways = [step.way for step in steps if step.keys]
        assert (ways.count(HOP), ways.count(BACK)) == (forth, back)
    for backward_too in (False, True):  # where nobody says, one document fills the row
        assert ring.schedule(work, backward_too) == ring.schedule(dataclasses.replace(work, hops=(7, 0)), backward_too)


def test_simulate_documents_waits_for_the_busiest_device_and_sends_nothing_unasked():
    work = Workload(seq_len=T, devices=P, heads=2, kv_heads=2, head_dim=8, segments=True)
    pairs = np.zeros((P, P))
    pairs[:, 0] = [10.0, 20.0, 30.0, 40.0]
    machine = Machine.of_speeds([1.0] * P, bandwidth=1e3)
    alone = simulate("ring", DEALT, dataclasses.replace(work, hops=(0, 0)), machine, pairs=pairs)
    assert alone.seconds == 80
    assert not [span for span in alone.spans if span.resource.startswith("link")]
    np.testing.assert_array_equal(alone.busy(), [20, 40, 60, 80])
    pairs[0, P - 1] = 5.0  # device 0 needs keys of the next one: a hop back
    back = simulate("ring", DEALT, dataclasses.replace(work, hops=(0, 1)), machine, pairs=pairs)
    size = 2 * work.bytes_of(T // P, 2) + 4 * T // P
    sent = [span for span in back.spans if span.resource == "link 1"]
    assert [span.end - span.start for span in sent] == [pytest.approx(size / 1e3)]
    assert back.busy()[0] == 30
    begun = next(span.start for span in back.spans if (span.resource, span.name) == ("device 0", f"hop {P - 1}"))
    assert begun >= sent[0].end


def test_simulate_asks_for_the_pairs_of_documents():
    work = Workload(seq_len=T, devices=P, segments=True)
    machine = Machine.of_speeds([1.0] * P)
    with pytest.raises(ValueError, match="or give the pairs of packed documents"):
        simulate("ring", DEALT, work, machine)
    with pytest.raises(ValueError, match="rows dealt by tables need their pairs"):
        simulate("ring", DEALT, dataclasses.replace(work, segments=False), machine)
    with pytest.raises(ValueError, match="pairs"):
        simulate("ring", DEALT, work, machine, pairs=np.zeros((2, 2)))


def test_document_rows_lose_no_token_and_see_every_document_once_in_turn():
    lengths = DocumentLengths(paths="", tokens=np.array([5, 9, 40, 1, 3]), counted="")
    rows = list(itertools.islice(lengths.rows(16, seed=3), 29))  # 464 tokens, eight times all of them
    assert all(row.sum() == 16 and (row > 0).all() for row in rows)
    ends = np.unique(np.concatenate([16 * n + np.cumsum(row) for n, row in enumerate(rows)]))
    for turn in range(8):
        assert 58 * (turn + 1) in ends
    assert any(not np.array_equal(rows[0], row) for row in rows)


def test_document_lengths_count_bytes_or_assume_or_ask_the_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 400)
    (tmp_path / "b.txt").write_text("y" * 41)
    data = DataConfig(paths=f"{tmp_path}/*.txt")
    assert DocumentLengths.read(data, 257).tokens.tolist() == [401, 42]
    assumed = DocumentLengths.read(data, 32_000)
    assert assumed.tokens.tolist() == [1 + 400 / ASSUMED_BYTES, 1 + 11]
    assert "assumed" in assumed.counted
    lines = "".join(json.dumps({"other": "o" * 1000, "text": "z" * 80}) + "\n" for _ in range(1000))
    (tmp_path / "c.jsonl").write_text(lines)
    of_text = DocumentLengths.read(DataConfig(paths=f"{tmp_path}/*.jsonl"), 257).tokens
    assert of_text.tolist() == [81] * 1000  # what else stands in a line is no text, also of those that are not read
    write_tokenizer(tmp_path, special=["<s>"])  # whose tokens are bytes
    data = DataConfig(paths=f"{tmp_path}/*.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    encoded = DocumentLengths.read(data, 32_000)
    assert encoded.tokens.tolist() == [401, 42]
    assert "tokenizer.json" in encoded.counted


@pytest.fixture(scope="module")
def plan():
    flags = ["--config=configs/gpu_8xh100_7b.py", "--config.seq_len=65536", "--config.model.num_layers=4"]
    return make_plan(parse_config(flags, "tiny"), find_topology("h100:1x8"))


def test_compare_layouts_of_even_documents_sends_nothing_where_they_are_dealt(plan):
    lengths = DocumentLengths(paths="p", tokens=np.full(64, 8192), counted="c")
    dealing = compare_layouts(plan, lengths)
    ways = {way.name: way for way in dealing.ways}
    first, dealt, ulysses = dealing.ways[0], ways["ring, dealt"], ways["ulysses, zigzag"]
    assert first.name == "ring, zigzag"
    assert first.hops == 7
    assert dealt.hops == 0
    assert dealt.sent == 0
    assert dealt.balance == 1
    assert dealing.visible == pytest.approx(1 / 8, rel=1e-3)
    assert dealing.speedup(first) == 1 < dealing.speedup(dealt) < dealing.attention_speedup(dealt)
    assert dealt.time.attention_waits < 0.01 * dealt.time.attention
    assert dealt.time.dense == ulysses.time.dense == plan.own.time.dense
    # Eight documents of 8,192 tokens in tiles of 1,024: (8 * 9 / 2) tiles each, of which 8.5 in 9 are visible.
    rate = plan.share.topology.chip.flops * plan.share.topology.kernel_rate("cudnn", 128).forward
    assert dealt.forward == pytest.approx(rate * 8 / 9, rel=0.03)
    read = json.loads(json.dumps(dealing_json(dealing)))
    assert read["ways"][0]["step_speedup"] == 1
    assert dealing_table(dealing).row_count == len(dealing.ways) + 5


def test_compare_layouts_waits_for_the_group_with_the_longest_documents(plan):
    mixed = DocumentLengths(paths="p", tokens=np.array([65536] + [1024] * 64), counted="c")
    config = dataclasses.replace(
        plan.share.config, batch_size=4, mesh=dataclasses.replace(plan.share.config.mesh, sp=2, fsdp=4)
    )
    apart = compare_layouts(make_plan(config, find_topology("h100:1x8")), mixed)
    dealt = next(way for way in apart.ways if way.name == "ring, dealt")
    assert dealt.balance < 1.06
    assert dealt.time.attention_waits > 0.2 * dealt.time.attention


def test_compare_layouts_refuses_where_nothing_is_dealt(plan):
    lengths = DocumentLengths(paths="p", tokens=np.array([100]), counted="c")
    windows = dataclasses.replace(
        plan.share.config, attention=dataclasses.replace(plan.share.config.attention, window=1024)
    )
    with pytest.raises(ConfigError, match="every layer has a window or a chunk"):
        compare_layouts(make_plan(windows, find_topology("h100:1x8")), lengths)
    alone = dataclasses.replace(plan.share.config, mesh=dataclasses.replace(plan.share.config.mesh, sp=1, fsdp=8))
    alone = dataclasses.replace(alone, batch_size=8, seq_len=8192)
    with pytest.raises(ConfigError, match="the mesh has sp=1"):
        compare_layouts(make_plan(alone, find_topology("h100:1x8")), lengths)
