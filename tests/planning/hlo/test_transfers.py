import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.models.config import ModelConfig
from ring_attention.parallel.chips import CHIPS
from ring_attention.planning.hlo import compiled
from ring_attention.planning.hlo.loops import trips_of
from ring_attention.planning.hlo.peak_times import PeakTimes, flops_of
from ring_attention.planning.hlo.program import Program
from ring_attention.planning.hlo.transfers import collectives_by_axis, transfers, warnings_of
from ring_attention.planning.prediction.shares import Share
from ring_attention.planning.prediction.topology import find_topology
from ring_attention.training.config import AttentionConfig, MeshConfig, TrainConfig

MESH = dict(dp=1, fsdp=2, sp=4, tp=1)
RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
BACK = "source_target_pairs={{0,3},{1,0},{2,1},{3,2},{4,7},{5,4},{6,5},{7,6}}"
V5E, H100 = CHIPS["v5e"], CHIPS["h100"]
HEAD = "HloModule program, is_scheduled=true, num_partitions=8\n"


def _entry(lines: str, called: str = "") -> str:
    """A program whose entry has these lines."""
    return f"{HEAD}\n{called}\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n{lines.rstrip()}\n}}\n"


# The forward pass of a ring on v5e:2x4 as libtpu 0.0.42 compiled it, cut down to one kernel, types and names as there.
TPU_RING = (
    HEAD
    + """
%body (wide.param.0: (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128])) -> (s32[]) {
  %constant.332 = s32[]{:T(128)} constant(1)
  %wide.param.0 = (s32[]{:T(128)}, bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, \
bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, /*index=3*/bf16[1,8,1024,128]{3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1048 = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.0), index=1
  %copy.149 = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)S(1)} copy(%get-tuple-element.1048)
  %collective-permute-start = (bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%copy.149), channel_id=1, RING, \
metadata={op_name="jit(fb)/jvp(jit(run))/shard_map/while/body/closed_call/ppermute" stack_frame_id=23}
  %get-tuple-element.1049 = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.0), index=2
  %collective-permute-start.1 = (bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.1049), channel_id=1, RING, \
metadata={op_name="jit(fb)/jvp(jit(run))/shard_map/while/body/closed_call/ppermute" stack_frame_id=23}
  %get-tuple-element.1044 = s32[]{:T(128)} get-tuple-element(%wide.param.0), index=0
  %fusion.111 = bf16[8,1024,128]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.0), index=3
  %splash_mha_fwd_residuals.17 = (bf16[8,1024,128]{2,1,0:T(8,128)(2,1)S(1)}, f32[8,1024,128]{2,1,0:T(8,128)S(1)}) \
custom-call(%fusion.111, %copy.149), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256, \\"block_kv\\": 256}"
}}, metadata={op_name="jit(fb)/jvp(jit(run))/shard_map/while/body/closed_call/splash_mha_fwd_residuals/pallas_call"}, \
backend_config={"custom_call_config":{"body":"AAAA","cost_estimate":{"flops":"2147483648","transcendentals":"2097152"}}}
  %add.584 = s32[]{:T(128)} add(%get-tuple-element.1044, %constant.332)
  %collective-permute-done = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} \
collective-permute-done(%collective-permute-start)
  %collective-permute-done.1 = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} \
collective-permute-done(%collective-permute-start.1)
  ROOT %tuple.248 = (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128]) \
tuple(%add.584, %collective-permute-done, %collective-permute-done.1, %fusion.111)
}

%condition (wide.param.9: (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128])) -> pred[] {
  %constant.323 = s32[]{:T(128)} constant(6)
  %wide.param.9 = (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128]) parameter(0)
  %get-tuple-element.759 = s32[]{:T(128)} get-tuple-element(%wide.param.9), index=0
  ROOT %lt.226 = pred[]{:T(512)} compare(%get-tuple-element.759, %constant.323), direction=LT
}

ENTRY %main (k: bf16[1,4,1024,128], v: bf16[1,4,1024,128], q: bf16[1,8,1024,128]) -> bf16[1,4,1024,128] {
  %zero = s32[]{:T(128)} constant(0)
  %k = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %v = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %q = bf16[1,8,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %copy.1 = s32[]{:T(128)} copy(%zero)
  %tuple.246 = (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128]) tuple(%copy.1, %k, %v, %q)
  %while.44 = (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128]) while(%tuple.246), \
condition=%condition, body=%body, metadata={op_name="jit(fb)/jvp(jit(run))/shard_map/while"}
  ROOT %out = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%while.44), index=1
}
""".replace("RING", RING)
)


def test_a_tpus_loop_is_counted_from_its_condition_and_k_and_v_share_their_link():
    key, value = transfers(TPU_RING, V5E, MESH)
    link, work = 1024 * 4 * 128 * 2 / 45e9, 4 * 1024 * 1024 / 2 * 128 * 8 / 197e12
    for found in (key, value):
        assert (found.phase, found.axes, found.bytes, found.runs, found.asynchronous) == (
            "forward", "sp", 2**20, 6, True,
        )  # fmt: skip
        assert found.compute_seconds == pytest.approx(work, rel=1e-5)  # and a count is added to
        assert found.link_seconds == pytest.approx(link)
        assert found.hidden_seconds == pytest.approx(work / 2, rel=1e-5)
    assert key.exposed_seconds + value.exposed_seconds == pytest.approx(2 * link - work, rel=1e-5)
    assert [item.bytes for item in compiled.collectives(TPU_RING)] == [6 * 2**20] * 2


def test_a_faster_link_exposes_nothing_and_a_slower_one_more():
    for bandwidth in (1e12, 1e20):  # the second in no time at all
        assert [x.exposed_seconds for x in transfers(TPU_RING, V5E, MESH, bandwidth=bandwidth)] == [0, 0]
    slow = transfers(TPU_RING, V5E, MESH, bandwidth=V5E.link / 10)
    usual = transfers(TPU_RING, V5E, MESH)
    assert all(a.exposed_seconds > b.exposed_seconds for a, b in zip(slow, usual, strict=True))


def _loop(compare: str, step: str, start: str = "constant(0)", bound: str = "constant(6)") -> str:
    return f"""{HEAD}
%body (p: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %p = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[8] get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[] {step}
  %y = f32[8] collective-permute(%x), {RING}
  ROOT %t = (s32[], s32[], f32[8]) tuple(%next, %n, %y)
}}

%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare({compare}
}}

%condition (q: (s32[], s32[], f32[8])) -> pred[] {{
  %q = (s32[], s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  ROOT %wrapped = pred[] fusion(%j, %m), kind=kLoop, calls=%compared
}}

ENTRY %main (x0: f32[8], given: s32[]) -> f32[8] {{
  %x0 = f32[8] parameter(0)
  %given = s32[] parameter(1)
  %start = s32[] {start}
  %bound = s32[] {bound}
  %init = (s32[], s32[], f32[8]) tuple(%start, %bound, %x0)
  %loop = (s32[], s32[], f32[8]) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8] get-tuple-element(%loop), index=2
}}
"""


@pytest.mark.parametrize(
    ("program", "trips"),
    [
        (_loop("%a, %b), direction=LT", "add(%i, %two)"), 3),
        (_loop("%a, %b), direction=LE", "add(%two, %i)"), 4),
        (_loop("%b, %a), direction=GT", "add(%i, %two)", start="constant(1)"), 3),
        (_loop("%a, %b), direction=GT", "subtract(%i, %two)", "constant(5)", "constant(-2)"), 4),
        (_loop("%a, %b), direction=GE", "subtract(%i, %two)", "constant(4)", "constant(0)"), 3),
        (_loop("%a, %b), direction=LT", "add(%i, %two)", start="constant(9)"), 0),
        (_loop("%a, %b), direction=LT", "add(%i, %two)", bound="copy(%given)"), None),
        (_loop("%a, %b), direction=LT", "add(%i, %two)", start="copy(%given)"), None),
        (_loop("%a, %b), direction=LT", "multiply(%i, %two)"), None),
        (_loop("%a, %b), direction=LT", "add(%i, %n)"), 1),
        (_loop("%a, %b), direction=LT", "subtract(%i, %two)"), None),
        (_loop("%a, %b), direction=NE", "add(%i, %two)"), None),
    ],
)
def test_trips_follow_from_start_step_and_bound_where_these_are_numbers(program, trips):
    (row,) = collectives_by_axis(program, MESH)
    assert (row.runs, row.instructions, row.bytes) == (trips, 1, 32 * (1 if trips is None else trips))
    (found,) = transfers(program, V5E, MESH)
    assert (found.runs, found.asynchronous, found.compute_seconds) == (trips, False, 0)
    assert found.exposed_seconds == pytest.approx(32 / 45e9)
    assert found.hidden_seconds == 0
    if trips is None:
        assert "runs unknown" in str(row)
        with pytest.raises(ValueError, match="unknown length: collective-permute %y"):
            compiled.collectives(program)


def test_trips_that_a_compiler_states_are_those_that_are_derived():
    def fn(x):
        turn = lambda _, x: jnp.sin(lax.ppermute(x, "sp", [(i, (i + 1) % 8) for i in range(8)]))  # noqa: E731
        return lax.fori_loop(3, 7, lambda _, x: lax.fori_loop(0, 5, turn, x) * 2, x)

    sharded = jax.shard_map(fn, mesh=ra.make_mesh(sp=8), in_specs=Spec("sp"), out_specs=Spec("sp"))
    text = jax.jit(sharded).lower(jax.ShapeDtypeStruct((16, 6), "float32")).compile().as_text()
    silent = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert silent != text
    program = Program.parse(silent)
    loops = [x for body in program.computations.values() for x in body.values() if x.opcode == "while"]
    assert sorted(trips_of(program, x) for x in loops) == [4, 5]
    assert compiled.totals(silent) == compiled.totals(text) == {"collective-permute": (20, 20 * 48)}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "sp"),
        ("replica_groups=[2,4]<=[8]", "sp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "fsdp"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "fsdp"),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "sp"),  # a part of it
        ("replica_groups=[1,8]<=[8]", "fsdp+sp"),
        ("replica_groups={}", "fsdp+sp"),
        ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", "?"),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", "?"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "sp"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "sp"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", "sp"),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_0','axis_1'}", "fsdp+sp"),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", "?"),
    ],
)
def test_axes_are_read_in_every_notation(groups, axes):
    text = _entry(f"  %p = f32[4] parameter(0)\n  ROOT %r = f32[4] all-reduce(%p), channel_id=1, {groups}, to_apply=%a")
    (row,) = collectives_by_axis(text, MESH)
    assert (row.kind, row.axes, row.runs, row.bytes) == ("all-reduce", axes, 1, 16)


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [(RING, "sp"), (BACK, "sp"), ("source_target_pairs={{0,4},{4,0}}", "fsdp"), ("source_target_pairs={{0,1}}", "sp")]
    + [("source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}", "fsdp+sp")]
    + [("source_target_pairs={{0,5},{5,0}}", "?")],
)
def test_axes_of_a_permute_are_those_of_the_rings_that_its_pairs_form(pairs, axes):
    text = _entry(f"  %p = f32[4] parameter(0)\n  ROOT %r = f32[4] collective-permute(%p), {pairs}")
    assert [row.axes for row in collectives_by_axis(text, MESH)] == [axes]


def test_devices_beyond_the_mesh_are_refused():
    with pytest.raises(ValueError, match="mesh_shape has 4 devices, but .* is for device 7; pass the shape"):
        collectives_by_axis(TPU_RING, dict(dp=1, fsdp=1, sp=4, tp=1))


def test_rows_join_what_is_of_one_kind_along_the_same_axes():
    text = _entry(f"""  %p = bf16[4] parameter(0)
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


# An all-gather that libtpu runs in pieces beside a matrix product; from a training step on v5e:2x4.
PIECES = """
%fused_computation.727 (param_0.2719: bf16[1,128,4,128]) -> (bf16[1,128,4,128], bf16[1,1024,4,128], s32[2]) {
  %param_0.2719 = bf16[1,128,4,128]{3,1,2,0} parameter(0)
  %all-gather.147 = bf16[1,1024,4,128]{3,1,2,0} all-gather(%param_0.2719), channel_id=20, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="3"}
  ROOT %custom-call.25 = (bf16[1,128,4,128], bf16[1,1024,4,128], s32[2]) custom-call(%all-gather.147), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.648 (param_0.2724: bf16[1,128,4,128], param_9: bf16[1024,512], param_10: bf16[1024,1024]) \
-> (bf16[1024,512], bf16[1,128,4,128], bf16[1,1024,4,128]) {
  %param_10 = bf16[1024,1024]{1,0} parameter(2)
  %param_9 = bf16[1024,512]{1,0} parameter(1)
  %convolution.139 = bf16[1024,512]{1,0} convolution(%param_10, %param_9), dim_labels=bf_io->bf
  %param_0.2724 = bf16[1,128,4,128] parameter(0)
  %all-gather.149 = bf16[1,1024,4,128] all-gather(%param_0.2724), channel_id=20, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="3"}
  ROOT %tuple.718 = (bf16[1024,512], bf16[1,128,4,128], bf16[1,1024,4,128]) \
tuple(%convolution.139, %param_0.2724, %all-gather.149)
}

%fused_computation.729 (param_0.2727: bf16[1,128,4,128]) -> bf16[1,1024,4,128] {
  %param_0.2727 = bf16[1,128,4,128] parameter(0)
  %all-gather.151 = bf16[1,1024,4,128] all-gather(%param_0.2727), channel_id=20, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="3"}
  ROOT %custom-call.27 = bf16[1,1024,4,128] custom-call(%param_0.2727, %all-gather.151), \
custom_call_target="AsyncCollectiveDone"
}
"""

PIECES_CALLED = """  %p0 = bf16[1,128,4,128]{3,1,2,0} parameter(0)
  %p1 = bf16[1024,512]{1,0} parameter(1)
  %p2 = bf16[1024,1024]{1,0} parameter(2)
  %async-collective-start.3 = (bf16[1,128,4,128]{3,1,2,0}, bf16[1,1024,4,128]{3,1,2,0}, s32[2]{0}) fusion(%p0), \
kind=kCustom, calls=%fused_computation.727
  %part = bf16[1,128,4,128]{3,1,2,0} get-tuple-element(%async-collective-start.3), index=0
  %fusion.648 = (bf16[1024,512]{1,0}, bf16[1,128,4,128]{3,1,2,0}, bf16[1,1024,4,128]{3,1,2,0}) \
fusion(%part, %p1, %p2), kind=kOutput, calls=%async_collective_fusion.648
  %other = bf16[1,128,4,128]{3,1,2,0} get-tuple-element(%fusion.648), index=1
  ROOT %async-collective-done.3 = bf16[1,1024,4,128]{3,1,2,0} fusion(%other), kind=kCustom, calls=%fused_computation.729
"""


def test_an_all_gather_that_runs_in_pieces_counts_once():
    text = _entry(PIECES_CALLED, PIECES)
    (row,) = collectives_by_axis(text, MESH)
    assert (row.kind, row.axes, row.runs, row.bytes) == ("all-gather", "fsdp+sp", 1, 1024 * 4 * 128 * 2)
    assert text.count(" all-gather(") == 3


def test_what_runs_beside_an_all_gather_in_pieces_takes_its_time_and_the_pieces_none():
    program = Program.parse(_entry(PIECES_CALLED, PIECES))
    times, entry = PeakTimes(program, V5E), program.computations["ENTRY"]
    taken = {name: times.of("ENTRY", x).seconds for name, x in entry.items() if x.opcode == "fusion"}
    assert taken == {
        "%async-collective-start.3": 0,
        "%fusion.648": pytest.approx(2 * 1024 * 1024 * 512 / V5E.flops),
        "%async-collective-done.3": 0,
    }


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    called = """%all-reduce-scatter.1 (x: f32[64,8]) -> f32[16,8] {
  %x = f32[64,8] parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.5 = f32[64,8] all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[16,8] dynamic-slice(%all-reduce.5, %zero, %zero), dynamic_slice_sizes={16,8}
}"""
    text = _entry(
        "  %p = f32[64,8] parameter(0)\n  ROOT %f = f32[16,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
        called,
    )
    (row,) = collectives_by_axis(text, MESH)
    assert (row.kind, row.axes, row.bytes, row.sent) == ("reduce-scatter", "sp", 16 * 8 * 4, 3 * 16 * 8 * 4)


def test_an_asynchronous_wrapper_counts_once_though_its_end_names_it_too():
    called = """%wrapped (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  ROOT %a2a = f32[8,4] all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}
}"""
    text = _entry("""  %p = f32[8,4] parameter(0)
  %start = ((f32[8,4]), f32[8,4], u32[]) async-start(%p), calls=%wrapped
  ROOT %done = f32[8,4] async-done(%start), calls=%wrapped
""", called)  # fmt: skip
    assert [(row.kind, row.runs, row.bytes) for row in collectives_by_axis(text, MESH)] == [("all-to-all", 1, 128)]


def _start(name: str, operand: str, pairs: str = RING, more: str = "", of: str = "f32[1000]") -> str:
    return f"  %{name} = ({of}, {of}) collective-permute-start(%{operand}), {pairs}{more}\n"


def _done(name: str, of: str = "f32[1000]") -> str:
    return f"  %{name}.end = {of} collective-permute-done(%{name})\n"


X = "  %x = f32[1000] parameter(0)\n"
ONE = 4000 / 45e9


def _work(name: str, seconds: float) -> str:
    size = round(seconds * V5E.memory_bandwidth / 4) - 1000
    return f'  %{name} = f32[{size}] custom-call(%x), custom_call_target="tpu_custom_call"\n'


@pytest.mark.parametrize("work", [0.0, 0.3 * ONE, 1.0 * ONE, 1.5 * ONE, 5 * ONE])
@pytest.mark.parametrize("ends", [("k", "v"), ("v", "k")])
def test_what_two_that_travel_together_expose_is_what_both_take_beyond_the_work(work, ends):
    lines = X + _start("k", "x") + _start("v", "x") + (_work("w", work) if work else "")
    found = transfers(_entry(lines + "".join(map(_done, ends))), V5E, MESH)
    assert sum(x.exposed_seconds for x in found) == pytest.approx(max(0, 2 * ONE - work), rel=1e-3, abs=1e-11)
    assert all(x.compute_seconds == pytest.approx(work, rel=1e-3) for x in found)
    assert all(-1e-12 <= x.hidden_seconds <= x.link_seconds for x in found)


def test_those_that_go_opposite_ways_share_nothing_on_a_tpu_and_the_link_on_a_gpu():
    lines = X + _start("k", "x") + _start("v", "x", BACK) + _done("k") + _done("v")
    assert sum(x.exposed_seconds for x in transfers(_entry(lines), V5E, MESH)) == pytest.approx(ONE)
    shared = transfers(_entry(lines), H100, MESH)
    assert sum(x.exposed_seconds for x in shared) == pytest.approx(2 * 4000 / 450e9, abs=1e-11)


def test_a_little_one_is_not_held_up_by_large_ones_that_nobody_awaits_yet():
    small = dict(of="f32[10]")
    lines = X + "  %y = f32[10] parameter(1)\n" + _start("k", "x") + _start("ids", "y", **small) + _done("ids", **small)
    key, ids = transfers(_entry(lines + _work("w", 2 * ONE) + _done("k")), V5E, MESH)
    assert ids.exposed_seconds == pytest.approx(ids.link_seconds)
    assert key.exposed_seconds == pytest.approx(ids.link_seconds)  # on its way while the device waits for the other


def test_a_hop_to_a_farther_neighbour_takes_more_links_on_a_tpu():
    pairs = "source_target_pairs={{0,2},{1,3},{2,0},{3,1},{4,6},{5,7},{6,4},{7,5}}"
    lines = X + _start("k", "x", pairs) + _done("k")
    assert transfers(_entry(lines), V5E, MESH)[0].link_seconds == pytest.approx(2 * ONE)
    assert transfers(_entry(lines), H100, MESH)[0].link_seconds == pytest.approx(4000 / 450e9)


@pytest.mark.parametrize("how", ["plain", "is_sync", "start that is never awaited here"])
def test_synchronous_ones_are_exposed_from_start_to_end_and_work_after_them_hides_nothing(how):
    if how == "plain":
        lines = X + f"  %k = f32[1000] collective-permute(%x), {RING}\n" + _work("w", 9 * ONE)
    elif how == "is_sync":
        config = ', backend_config={"collective_backend_config":{"is_sync":true}}'
        lines = X + _start("k", "x", more=config) + _work("w", 9 * ONE) + _done("k")
    else:
        lines = X + _work("w", 9 * ONE) + _start("k", "x")
    (found,) = transfers(_entry(lines), V5E, MESH)
    assert found.asynchronous == (how[0] == "s")
    assert (found.compute_seconds, found.hidden_seconds) == (0, 0)
    assert found.exposed_seconds == pytest.approx(ONE)


def test_the_pass_is_told_by_the_name_that_jax_gave():
    names = ["jit(f)/jvp(jit(run))/while/ppermute", "jit(step)/transpose(jvp())/checkpoint/ppermute", None]
    lines = X
    for number, name in enumerate(names):
        more = f', metadata={{op_name="{name}"}}' if name else ""
        lines += _start(f"k{number}", "x", more=more) + _done(f"k{number}")
    assert [x.phase for x in transfers(_entry(lines), V5E, MESH)] == ["forward", "backward", "?"]


BRANCHES = """
%short (a: f32[1000]) -> f32[1000] {
  %a = f32[1000] parameter(0)
  ROOT %a2 = f32[1000] negate(%a)
}

%long (b: f32[1000]) -> f32[1000] {
  %b = f32[1000] parameter(0)
  %b2 = f32[1000] negate(%b)
  ROOT %b3 = f32[1000] negate(%b2)
}

%test (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  ROOT %yes = pred[] custom-call(%i), custom_call_target="anything"
}
"""


def test_a_conditional_takes_its_longest_branch_and_a_loop_of_unknown_length_one_turn():
    lines = """  %x = f32[1000] parameter(0)
  %which = s32[] constant(0)
  %c = f32[1000] conditional(%which, %x, %x), branch_computations={%short, %long}
  %called = f32[1000] call(%x), to_apply=%short
  %w = f32[1000] while(%x), condition=%test, body=%long
  %w3 = f32[1000] while(%x), condition=%test, body=%long, backend_config={"known_trip_count":{"n":"3"}}
"""
    program = Program.parse(_entry(lines, BRANCHES))
    times, one = PeakTimes(program, V5E), 8000 / V5E.memory_bandwidth
    found = {name: times.of("ENTRY", x) for name, x in program.computations["ENTRY"].items()}
    assert [found[name].seconds for name in ("%c", "%called", "%w", "%w3")] == pytest.approx(
        [2 * one, one, 2 * one, 6 * one]
    )
    assert [found[name].unknown_loops for name in ("%c", "%w", "%w3")] == [0, 1, 0]
    beside = _start("k", "x") + lines.partition("\n")[2] + _done("k")
    (permute,) = transfers(_entry(X + beside, BRANCHES), V5E, MESH)
    assert (permute.unknown_loops, permute.compute_seconds) == (1, pytest.approx(11 * one))


def _flops(line: str, *operands: str) -> float:
    given = "".join(f"  %p{i} = {shape} parameter({i})\n" for i, shape in enumerate(operands))
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    program = Program.parse(_entry(given + "  " + line.replace("(...)", f"({names})")))
    return flops_of(program, "ENTRY", program.root("ENTRY"))


def test_products_of_dots_and_of_convolutions_that_stand_for_them():
    dot = "ROOT %d = f32[4,512,128] dot(...), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
    assert _flops(dot + "rhs_contracting_dims={1}", "f32[4,512,256]", "f32[4,256,128]") == 2 * 4 * 512 * 128 * 256
    plain = "ROOT %c = bf16[1024,2048] convolution(...), dim_labels=bf_io->bf"
    assert _flops(plain, "bf16[1024,512]", "bf16[512,2048]") == 2 * 1024 * 512 * 2048
    heads = (
        "ROOT %c = bf16[1024,4,128] convolution(...), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f"
    )
    assert _flops(heads, "bf16[1024,700,1]", "bf16[700,4,128]") == 2 * 1024 * 700 * 4 * 128
    out = "ROOT %c = bf16[1024,900,1] convolution(...), window={size=8}, dim_labels=b0f_0io->bf0"
    assert _flops(out, "bf16[1024,8,128]", "bf16[8,128,900]") == 2 * 1024 * 900 * 8 * 128
    image = "ROOT %c = f32[1,5,3] convolution(...), window={size=3 pad=1_1 stride=2}, dim_labels=b0f_0io->b0f"
    assert _flops(image, "f32[1,9,2]", "f32[3,2,3]") == 2 * 3 * 2 * (3 * 5 - 2)  # two of 15 meet the padding


def _cudnn(backward: bool, mask: str, window: int = 0) -> str:
    shape = (
        '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["1", "32", "8192", "4096"], "layout": {}}'
    )
    config = f'{{"fmha_scale": 0.08, {shape}, "mask_type": "{mask}", "sliding_window_length": {window}}}'
    return (
        f'ROOT %a = (bf16[1,32,8192,128], u8[0]) custom-call(...), custom_call_target="__cudnn$fmhaSoftmax'
        f'{"Backward" * backward}", backend_config={{"cudnn_fmha_backend_config": {config}}}'
    )


@pytest.mark.parametrize(("backward", "times"), [(False, 4), (True, 10)])
def test_products_of_cudnns_attention_follow_its_scores_and_mask(backward, times):
    arrays = ("bf16[1,32,8192,128]", "bf16[1,8,4096,128]")
    full = times * 32 * 8192 * 4096 * 128
    assert _flops(_cudnn(backward, "NO_MASK"), *arrays) == full
    assert _flops(_cudnn(backward, "CAUSAL"), *arrays) == full / 2
    assert _flops(_cudnn(backward, "CAUSAL", 512), *arrays) == full / 8


def test_products_of_cublas_and_none_of_what_is_not_known():
    gemm = (
        'ROOT %g = (bf16[64,96], s8[1000]) custom-call(...), custom_call_target="__cublas$gemm", backend_config={'
        '"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}'
    )
    assert _flops(gemm, "bf16[64,32]", "bf16[32,96]") == 2 * 64 * 32 * 96
    assert _flops('ROOT %o = f32[8] custom-call(...), custom_call_target="other"', "f32[8]") == 0


@pytest.mark.parametrize(
    ("line", "tpu_bytes"),
    [
        ("%y = f32[64,1000]{1,0:T(8,128)} negate(%p)", 2 * 256_000),
        ("%y = f32[64,1000]{1,0:T(8,128)S(1)} negate(%p)", 256_000),
        ("%y = f32[1000]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,1000}", 2 * 4000),
        ("%y = f32[64,1000]{1,0} dynamic-update-slice(%p, %u, %i)", 2 * 4000),
        ("%y = f32[1000]{0} fusion(%p, %i), kind=kLoop, calls=%sliced", 2 * 4000),
        ("%y = f32[64,1000]{1,0} fusion(%p, %u, %i), kind=kLoop, calls=%updated", 2 * 4000),
        ("%y = f32[64,1000]{1,0} copy-done(%p)", 0),
        ("%y = f32[64,1000]{1,0} bitcast(%p)", 0),
    ],
)
def test_bytes_are_those_of_the_hbm_and_of_a_slice_only_the_slice(line, tpu_bytes):
    called = """%sliced (a: f32[64,1000], b: s32[]) -> f32[1000] {
  %a = f32[64,1000] parameter(0)
  %b = s32[] parameter(1)
  %s = f32[1,1000] dynamic-slice(%a, %b), dynamic_slice_sizes={1,1000}
  ROOT %n = f32[1000] negate(%s)
}

%updated (c: f32[64,1000], d: f32[1,1000], e: s32[]) -> f32[64,1000] {
  %c = f32[64,1000] parameter(0)
  %d = f32[1,1000] parameter(1)
  %e = s32[] parameter(2)
  ROOT %o = f32[64,1000] dynamic-update-slice(%c, %d, %e)
}
"""
    given = """  %p = f32[64,1000]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %u = f32[1,1000]{1,0} parameter(2)
"""
    program = Program.parse(_entry(given + f"  {line}\n", called))
    seconds = PeakTimes(program, V5E).of("ENTRY", program.computations["ENTRY"]["%y"]).seconds
    assert seconds * V5E.memory_bandwidth == pytest.approx(tpu_bytes, abs=1e-3)


def _share(strategy: str = "ring", t: int = 4096, **model) -> Share:
    sizes = dict(
        vocab_size=32_000, num_layers=3, model_dim=1536, num_heads=12, num_kv_heads=6, head_dim=128, ffn_dim=5120
    )
    config = TrainConfig(
        name="test",
        model=ModelConfig(**(sizes | model), compute_dtype="bfloat16"),
        attention=AttentionConfig(strategy=strategy, impl="splash"),
        mesh=MeshConfig(sp=8),
        seq_len=8 * t,
        num_steps=1000,
    )
    return Share.of(config, find_topology("v5e:2x4"))


def test_a_clean_program_has_no_warnings():
    text = _entry("""  %w = bf16[192,12,128] parameter(0)
  %weight = bf16[1536,12,128] all-gather(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %ids = s32[1,32768] all-gather(%w), replica_groups=[1,8]<=[8], dimensions={1}
  %tile = pred[6,256,256] custom-call(), custom_call_target="anything"
  %scores = f32[2,4096,256] custom-call(), custom_call_target="anything"
  %norms = f32[3,1536] all-reduce(%w), replica_groups=[1,8]<=[8], to_apply=%add
  %queries = bf16[1,12,4096,128] custom-call(), custom_call_target="anything"
""")
    assert warnings_of(text, _share()) == []
    ring = TPU_RING.replace(RING, "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}")
    assert warnings_of(ring, _share()) == []


def test_a_synchronous_permute_is_named():
    (line,) = warnings_of(_entry(X + f"  ROOT %k.1 = f32[1000] collective-permute(%x), {RING}"), _share())
    assert re.match(r"%k.1 \(\?, 0.00381 MiB, 1 times\) is synchronous, nothing hides it; give the compiler work", line)


@pytest.mark.parametrize(
    ("line", "strategy", "seen"),
    [
        ("bf16[1,6,32768,128] all-gather(%p)", "ring", True),
        ("bf16[1,1,32768,128] all-gather(%p)", "all_gather", True),
        ("bf16[25165824] all-gather(%p)", "ring", True),  # as many elements as all keys
        ("bf16[1,6,32768,128] all-reduce(%p)", "ring", True),
        ("bf16[1,3,32768,128] all-to-all(%p)", "ring", True),
        ("bf16[1,3,32768,128] all-to-all(%p)", "ulysses", False),
        ("bf16[1,6,4096,128] all-gather(%p)", "ring", False),
        ("bf16[32000,1536] all-gather(%p)", "ring", False),
        ("bf16[3,1536,5120] all-gather(%p)", "ring", False),
        ("s32[1,32768] all-gather(%p)", "ring", False),
    ],
)
def test_whole_sequences_on_one_device_are_seen_and_weights_are_not(line, strategy, seen):
    heads = dict(num_heads=16, num_kv_heads=8) if strategy == "ulysses" else {}
    text = _entry(f"  %p = bf16[8] parameter(0)\n  ROOT %r = {line}, replica_groups=[1,8]<=[8], to_apply=%add")
    lines = warnings_of(text, _share(strategy, **heads))
    assert len(lines) == seen
    if seen:
        assert re.match(
            r"all-[\w-]+ %r gives each device bf16\[[\d,]+\] \([\d.]+ MiB\), all 32768 tokens; keep", lines[0]
        )


def test_a_gather_within_one_device_of_the_ring_is_none_of_its_business():
    text = _entry(
        "  %p = bf16[8] parameter(0)\n  ROOT %r = bf16[1,6,32768,128] all-gather(%p), replica_groups={{0},{1}}"
    )
    assert warnings_of(text, _share()) == []


@pytest.mark.parametrize(
    ("array", "what"),
    [
        ("pred[4096,32768]", "a mask of whole shards"),  # [t, T]
        ("pred[1,1,4096,4096]", "a mask of whole shards"),
        ("s32[4096,4096]", "a mask of whole shards"),
        ("f32[1,32768,32768]", "a mask of whole shards"),
        ("pred[7,4096,256]", "a mask for each hop"),
        ("f32[8,256,256]", "a mask for each hop"),
        ("pred[7,16,256,256]", "a mask for each hop"),
        ("bf16[4096,4096]", None),
        ("pred[256,256]", None),
        ("f32[12,4096,128]", None),
        ("f32[4096,1536]", None),
        ("f32[7,4096]", None),
    ],
)
def test_masks_that_lie_in_memory_are_seen(array, what):
    text = _entry(f"  %p = s32[4096] parameter(0)\n  %m.1 = {array}{{1,0}} compare(%p, %p), direction=GE")
    lines = warnings_of(text, _share())
    assert len(lines) == (what is not None)
    if what:
        assert re.match(rf"%m.1 keeps {re.escape(array)} \([\d.e+]+ MiB\), {what}, in memory; compute it", lines[0])


def test_a_mask_within_a_fusion_lies_nowhere_and_one_that_is_given_is_seen():
    called = """%inside (a: s32[4096]) -> f32[4096] {
  %a = s32[4096] parameter(0)
  %m = pred[4096,4096] compare(%a, %a), direction=GE
  ROOT %o = f32[4096] reduce(%m)
}"""
    fused = "  %p = s32[4096] parameter(0)\n  %f = f32[4096] fusion(%p), kind=kLoop, calls=%inside"
    assert warnings_of(_entry(fused, called), _share()) == []
    given = "  %p = pred[4096,4096] parameter(0)\n  %g = (pred[4096,4096]) tuple(%p)"
    assert len(warnings_of(_entry(given), _share())) == 1


def test_sizes_that_the_model_has_too_tell_nothing():
    text = _entry("  %p = s32[4096] parameter(0)\n  %m = f32[4096,4096]{1,0} add(%p, %p)")
    assert len(warnings_of(text, _share())) == 1
    assert warnings_of(text, _share(ffn_dim=4096)) == []


def test_a_tile_as_large_as_a_shard_is_no_mask_but_one_for_all_keys_is():
    share = _share(t=256)
    text = _entry("  %p = s32[256] parameter(0)\n  %m = pred[256,256]{1,0} compare(%p, %p), direction=GE")
    assert warnings_of(text, share) == []
    assert len(warnings_of(text.replace("pred[256,256]", "pred[256,2048]"), share)) == 1


def test_a_dense_mask_of_a_real_program_is_seen_and_a_ring_has_none():
    model = dict(vocab_size=1000, model_dim=96, num_heads=3, num_kv_heads=3, head_dim=32, ffn_dim=160)
    share = _share(t=1024, **model)
    shape, mesh = jax.ShapeDtypeStruct((1, 8192, 3, 32), "float32"), ra.make_mesh(sp=8)

    def dense(q, k, v):
        k, v = (lax.all_gather(x, "sp", axis=1, tiled=True) for x in (k, v))
        seen = lax.axis_index("sp") * 1024 + jnp.arange(1024)[:, None] >= jnp.arange(8192)
        scores = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", q, k), -1e9)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)

    ring = lambda *qkv: ra.ring_attention(*qkv, mesh=mesh, layout="zigzag", impl="xla")  # noqa: E731
    sharded = jax.shard_map(dense, mesh=mesh, in_specs=Spec(None, "sp"), out_specs=Spec(None, "sp"))
    texts = {fn: jax.jit(fn).lower(shape, shape, shape).compile().as_text() for fn in (sharded, ring)}
    found = [line for line in warnings_of(texts[sharded], share) if "synchronous" not in line]
    assert sum("gives each device f32[1,8192,3,32]" in line for line in found) == 2
    assert any("a mask of whole shards" in line for line in found)
    assert [line for line in warnings_of(texts[ring], share) if "synchronous" not in line] == []


def test_waits_of_a_computation_add_up_whatever_the_order_of_starts_and_ends():
    flights = ("a", "b", "c")
    for order in itertools.permutations(flights):
        lines = X + _start("a", "x") + _work("w1", 0.5 * ONE) + _start("b", "x", BACK) + _start("c", "x")
        lines += _work("w2", 0.25 * ONE) + "".join(map(_done, order))
        found = {x.name: x for x in transfers(_entry(lines), V5E, MESH)}
        total = sum(x.exposed_seconds for x in found.values())
        forth = 2 * ONE - 0.75 * ONE  # a and c share a link, which is never idle until both have arrived
        assert forth - 1e-11 <= total <= forth + 0.75 * ONE
        assert all(x.exposed_seconds <= x.link_seconds + 1e-12 for x in found.values())


def test_rows_and_transfers_are_plain_values():
    (row,) = collectives_by_axis(TPU_RING, MESH)
    assert dataclasses.asdict(row) == dict(
        kind="collective-permute", axes="sp", instructions=2, runs=12, bytes=12 * 2**20, sent=12 * 2**20
    )
