import dataclasses

import pytest
from hlo_texts import MESH, ONE, PIECES, PIECES_CALLED, RING, TPU_RING, V5E, X, hlo, kernel, receive, send

from ring_attention.planning.hlo import compiled
from ring_attention.planning.hlo.transfers import collectives_by_axis, overlap_of, transfers


def test_transfers_of_a_tpu_loop_share_their_link():
    key, value = transfers(TPU_RING, V5E, MESH)
    link, work = 1024 * 4 * 128 * 2 / 45e9, 4 * 1024 * 1024 / 2 * 128 * 8 / 197e12
    for found in (key, value):
        assert (found.phase, found.axes, found.bytes, found.runs, found.asynchronous) == (
            "forward", "sp", 2**20, 6, True,
        )  # fmt: skip
        assert found.compute_seconds == pytest.approx(work, rel=1e-5)  # and a count is added to
        assert found.link_seconds == pytest.approx(link)
        assert found.link_seconds - found.exposed_seconds == pytest.approx(work / 2, rel=1e-5)
    assert key.exposed_seconds + value.exposed_seconds == pytest.approx(2 * link - work, rel=1e-5)
    assert [item.bytes for item in compiled.collectives(TPU_RING)] == [6 * 2**20] * 2


def test_transfers_on_a_slower_link_are_exposed_more():
    for bandwidth in (1e12, 1e20):  # the second in no time at all
        assert [x.exposed_seconds for x in transfers(TPU_RING, V5E, MESH, bandwidth=bandwidth)] == [0, 0]
    slow = transfers(TPU_RING, V5E, MESH, bandwidth=V5E.link / 10)
    usual = transfers(TPU_RING, V5E, MESH)
    assert all(a.exposed_seconds > b.exposed_seconds for a, b in zip(slow, usual, strict=True))


def test_collectives_by_axis_joins_kinds_and_axes():
    text = hlo(f"""  %p = bf16[4] parameter(0)
  %a = bf16[16] all-gather(%p), replica_groups=[2,4]<=[8], dimensions={{0}}
  %b = bf16[16] all-gather(%p), replica_groups=[2,4]<=[8], dimensions={{0}}
  %c = bf16[8] all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={{0}}
  ROOT %d = bf16[4] collective-permute(%p), {RING}
""")
    rows = collectives_by_axis(text, MESH)
    assert [(row.kind, row.axes, row.instructions, row.runs, row.bytes, row.sent) for row in rows] == [
        ("all-gather", "sp", 2, 2, 64, 48),
        ("all-gather", "fsdp", 1, 1, 16, 8),
        ("collective-permute", "sp", 1, 1, 8, 8),
    ]
    assert str(rows[0]) == "all-gather along sp: 2 runs, 64 bytes received, 48 sent"


def test_collectives_by_axis_counts_a_gather_in_pieces_once():
    text = hlo(PIECES_CALLED, PIECES)
    (row,) = collectives_by_axis(text, MESH)
    assert (row.kind, row.axes, row.runs, row.bytes) == ("all-gather", "fsdp+sp", 1, 1024 * 4 * 128 * 2)
    assert text.count(" all-gather(") == 3


def test_collectives_by_axis_knows_a_fused_reduce_scatter():
    called = """%all-reduce-scatter.1 (x: f32[64,8]) -> f32[16,8] {
  %x = f32[64,8] parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.5 = f32[64,8] all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[16,8] dynamic-slice(%all-reduce.5, %zero, %zero), dynamic_slice_sizes={16,8}
}"""
    text = hlo(
        "  %p = f32[64,8] parameter(0)\n  ROOT %f = f32[16,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
        called,
    )
    (row,) = collectives_by_axis(text, MESH)
    assert (row.kind, row.axes, row.bytes, row.sent) == ("reduce-scatter", "sp", 16 * 8 * 4, 3 * 16 * 8 * 4)


def test_collectives_by_axis_counts_async_wrappers_once():
    called = """%wrapped (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  ROOT %a2a = f32[8,4] all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}
}"""
    text = hlo("""  %p = f32[8,4] parameter(0)
  %start = ((f32[8,4]), f32[8,4], u32[]) async-start(%p), calls=%wrapped
  ROOT %done = f32[8,4] async-done(%start), calls=%wrapped
""", called)  # fmt: skip
    assert [(row.kind, row.runs, row.bytes) for row in collectives_by_axis(text, MESH)] == [("all-to-all", 1, 128)]


def test_transfers_tell_the_pass_by_jaxs_name():
    names = ["jit(f)/jvp(jit(run))/while/ppermute", "jit(step)/transpose(jvp())/checkpoint/ppermute", None]
    lines = X
    for number, name in enumerate(names):
        more = f', metadata={{op_name="{name}"}}' if name else ""
        lines += send(f"k{number}", "x", more=more) + receive(f"k{number}")
    assert [x.phase for x in transfers(hlo(lines), V5E, MESH)] == ["forward", "backward", "?"]


def test_transfers_and_rows_are_plain_values():
    (row,) = collectives_by_axis(TPU_RING, MESH)
    assert dataclasses.asdict(row) == dict(
        kind="collective-permute", axes="sp", instructions=2, runs=12, bytes=12 * 2**20, sent=12 * 2**20
    )


def test_overlap_of_tells_which_permutes_a_hop_hides():
    overlap = overlap_of("""
%body (x: f32[8]) -> f32[8] {
  %collective-permute-start.1 = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
  %both = ((f32[4]{0}, bf16[6]{0}), (f32[4]{0}, bf16[6]{0})) collective-permute-start(%y, %z), channel_id=2
  %hop = (s32[], f32[8]{0}) while(%init), condition=%c, body=%b
  %collective-permute-done.1 = f32[8]{0} collective-permute-done(%collective-permute-start.1)
  %done = (f32[4]{0}, bf16[6]{0}) collective-permute-done(%both)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %ring = f32[8]{0} while(%x), condition=%c, body=%body
  %start = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), channel_id=3
  %exposed = f32[8]{0} collective-permute-done(%start)
  %merged = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), channel_id=3
  %filled = f32[8]{0} fusion(), kind=kLoop, calls=%zeros
  %merging = (s32[], f32[8]{0}) fusion(%x, %y), kind=kLoop, calls=%merge
  %merged.done = f32[8]{0} collective-permute-done(%merged)
  %little = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), channel_id=3
  %filled.too = f32[8]{0} fusion(), kind=kLoop, calls=%zeros
  %maximum = f32[7]{0} fusion(%x), kind=kLoop, calls=%max
  %little.done = f32[8]{0} collective-permute-done(%little)
  %at.once = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), backend_config={"is_sync":true}
  %too = f32[8]{0} collective-permute-done(%at.once)
  %plain = f32[8]{0} collective-permute(%x), channel_id=4
}
""")
    assert vars(overlap) == dict(
        asynchronous=5,
        hidden=2,
        beside_other_work=1,
        synchronous=2,
        exposed=4,
        exposed_bytes=4 * 32,
        bytes_in_flight=32 + 16 + 12,
    )


def _between_slices(name, kind, target="{1,2}x{0:3}"):
    """Lines that start to exchange %x with other slices by the hosts, and that await it, as libtpu 0.0.42 has them."""
    start = f"""  %{name}.token = token[] after-all()
  %{name}.out = (f32[1000], u32[], token[]) send(%x, %{name}.token), channel_id=2, is_host_transfer=true
  %{name} = (f32[1000], u32[], token[]) recv(%{name}.token), channel_id=1, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{target}",\
_xla_megascale_transfer_type="{kind}"}}
"""
    end = f"  %{name}.sent = token[] send-done(%{name}.out), channel_id=2, is_host_transfer=true\n"
    return (
        start,
        end + f"  %{name}.end = (f32[1000], token[]) recv-done(%{name}), channel_id=1, is_host_transfer=true\n",
    )


def test_what_goes_between_slices_takes_the_network_beside_the_links_of_a_slice():
    start, end = _between_slices("far", "ONE_TO_ONE", "{{100001->200000},{200001->100000}}")
    text = hlo(X + start + send("near", "x") + kernel("work", 2 * ONE) + receive("near") + end)
    far, near = transfers(text, V5E, MESH)
    assert (far.axes, near.axes, far.asynchronous, far.beside) == ("slices", "sp", True, "hop")
    assert far.link_seconds == pytest.approx(4000 / V5E.network)
    assert far.exposed_seconds == pytest.approx(4000 / V5E.network - 2 * ONE)
    assert near.exposed_seconds == 0


@pytest.mark.parametrize(("slices", "target"), [(2, "{1,2}x{0:3}"), (4, "{1:4}x{0:3}")])
def test_sums_over_slices_count_as_such(slices, target):
    start, end = _between_slices("sum", "ALL_REDUCE", target)
    (row,) = collectives_by_axis(hlo(X + start + end), MESH)
    assert (row.kind, row.axes, row.bytes) == ("all-reduce", "slices", 4000)
    assert row.sent == 2 * 4000 * (slices - 1) // slices
