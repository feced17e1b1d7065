import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.planning.hlo import compiled

SHARDED = Spec("sp")
RING = [(i, (i + 1) % 8) for i in range(8)]


def _program(fn, *shapes, out_specs=SHARDED, dtype="float32"):
    """Text of `fn` compiled for eight devices, each with its slice of the leading axis."""
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    sharded = jax.shard_map(fn, mesh=ra.make_mesh(sp=8), in_specs=(SHARDED,) * len(args), out_specs=out_specs)
    return jax.jit(sharded).lower(*args).compile().as_text()


@pytest.mark.parametrize(
    ("fn", "kind", "array", "sent"),
    [
        (lambda x: lax.all_gather(x, "sp", tiled=True), "all-gather", (24, 5), 7 * 60),
        (lambda x: lax.psum_scatter(x, "sp", scatter_dimension=1, tiled=True), "reduce-scatter", (3, 1), 7 * 12),
        (lambda x: lax.ppermute(x, "sp", RING), "collective-permute", (3, 5), 60),
        (lambda x: lax.psum(x, "sp"), "all-reduce", (3, 5), 2 * 60 * 7 // 8),
        (lambda x: lax.all_to_all(x, "sp", 1, 0, tiled=True), "all-to-all", None, 96 * 7 // 8),
    ],
    ids=["all_gather", "psum_scatter", "ppermute", "psum", "all_to_all"],
)
def test_collectives_finds_each_kind_and_its_bytes(fn, kind, array, sent):
    columns = 8 if kind in ("reduce-scatter", "all-to-all") else 5
    out_specs = Spec() if kind == "all-reduce" else SHARDED
    found = compiled.collectives(_program(fn, (24, columns), out_specs=out_specs))
    assert [(item.kind, item.runs, item.group) for item in found] == [(kind, 1, 8)]
    assert compiled.sent(_program(fn, (24, columns), out_specs=out_specs)) == sent
    if array is not None:
        assert found[0].arrays == (compiled.Array("f32", array),)
    assert found[0].bytes == 4 * (3 * 8 if array is None else array[0] * array[1])


def test_collectives_reads_groups_in_both_notations():
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    program = _program(lambda x: lax.all_gather(x, "sp", tiled=True, axis_index_groups=pairs), (24, 5))
    (found,) = compiled.collectives(program)
    assert (found.group, found.sent) == (2, 60)
    iota = program.replace("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "replica_groups=[4,2]<=[8]")
    assert iota != program
    assert compiled.collectives(iota) == [found]


def test_collectives_in_a_loop_run_on_every_turn():
    def fn(x):
        return lax.fori_loop(0, 5, lambda _, x: lax.pcast(jnp.sin(lax.psum(x, "sp")), "sp", to="varying"), x)

    program = _program(fn, (24, 7))
    assert [(item.kind, item.runs, item.bytes) for item in compiled.collectives(program)] == [
        ("all-reduce", 5, 5 * 3 * 7 * 4)
    ]
    assert compiled.totals(program) == {"all-reduce": (5, 5 * 3 * 7 * 4)}


def test_totals_multiplies_loops_in_loops():
    def inner(_, x):
        return jnp.sin(lax.ppermute(x, "sp", RING))

    def outer(_, x):
        x = lax.fori_loop(0, 3, inner, x)
        return x + lax.psum_scatter(lax.all_gather(x, "sp", tiled=True), "sp", tiled=True)

    totals = compiled.totals(_program(lambda x: lax.fori_loop(0, 4, outer, x), (16, 6)))
    one = 2 * 6 * 4
    assert totals == {
        "collective-permute": (12, 12 * one),
        "all-gather": (4, 4 * 8 * one),
        "reduce-scatter": (4, 4 * one),
    }


def test_collectives_in_a_branch_count_as_run():
    def fn(x):
        turn = lambda x: lax.ppermute(x, "sp", RING)  # noqa: E731
        return lax.cond(lax.psum(x.sum(), "sp") > 0, turn, lambda x: -x, x)

    assert compiled.totals(_program(fn, (16, 6)))["collective-permute"] == (1, 2 * 6 * 4)


def test_collectives_finds_none_where_there_are_none():
    assert compiled.totals(_program(lambda x: jnp.sin(x), (16, 6))) == {}


def test_collectives_refuses_loops_of_unknown_length():
    def fn(x):
        return lax.while_loop(lambda x: lax.psum(x.sum(), "sp") < 9.0, lambda x: 2 * lax.ppermute(x, "sp", RING), x)

    program = _program(fn, (16, 6))
    with pytest.raises(ValueError, match="a collective runs in a loop of unknown length: .*collective-permute"):
        compiled.collectives(program)


def test_collectives_accepts_unknown_loops_that_send_nothing():
    def fn(x):
        x = lax.while_loop(lambda x: x.sum() < 9.0, lambda x: 2 * x, x)
        return lax.ppermute(x, "sp", RING)

    assert compiled.totals(_program(fn, (16, 6))) == {"collective-permute": (1, 2 * 6 * 4)}


def test_arrays_lists_all_that_instructions_make():
    program = _program(lambda x: jnp.sin(x @ x.T).sum(1).astype(jnp.int8), (24, 5), dtype="float32")
    found = compiled.arrays(program)
    assert {compiled.Array("f32", (3, 5)), compiled.Array("f32", (3, 3)), compiled.Array("s8", (3,))} <= found
    assert compiled.Array("bf16", (3, 7)).bytes == 42
    assert compiled.Array("f32", ()).size == 1


ASYNCHRONOUS = """HloModule step

ENTRY %main (p0: bf16[4,8]) -> bf16[4,8] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%p0), channel_id=1
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  %ag = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%done), channel_id=2, dimensions={0}
  ROOT %agd = bf16[32,8]{1,0} all-gather-done(%ag)
}
"""


def test_collectives_counts_starts_with_their_result_once():
    found = compiled.collectives(ASYNCHRONOUS)
    assert [(item.kind, item.runs, item.bytes) for item in found] == [
        ("collective-permute", 1, 64),
        ("all-gather", 1, 512),
    ]


COMBINED = """HloModule ring

ENTRY %main (k: bf16[2,8], v: bf16[4,8]) -> bf16[4,8] {
  %k = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %v = bf16[4,8]{1,0} parameter(1)
  %start = ((bf16[2,8]{1,0}, bf16[4,8]{1,0}), (bf16[2,8]{1,0}, bf16[4,8]{1,0})) collective-permute-start(\
bf16[2,8]{1,0:T(8,128)(2,1)} %k, %v), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) collective-permute-done(%start)
  %sum = (f32[2]{0}, f32[3]{0}) all-reduce-start(%a, %b), channel_id=2
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%done), index=1
}
"""


def test_collectives_counts_all_arrays_of_joined_permutes():
    found = compiled.collectives(COMBINED)
    assert [(item.kind, item.bytes) for item in found] == [("collective-permute", 32 + 64), ("all-reduce", 8 + 12)]


def test_collectives_refuses_text_that_is_no_program():
    with pytest.raises(ValueError, match="not a compiled program in HLO; pass"):
        compiled.collectives("HloModule nothing")


def test_memory_of_tells_arguments_outputs_and_aliases():
    shape = jax.ShapeDtypeStruct((24, 5), "float32")
    added = jax.jit(lambda x, y: (x + y, x.sum(1)), donate_argnums=0).lower(shape, shape).compile()
    memory = compiled.memory_of(added)
    assert (memory.arguments, memory.aliased, memory.host) == (2 * 480, 480, 0)
    assert memory.outputs >= 480 + 96
    assert memory.total == memory.outputs + 480 + memory.temporaries + memory.code


def test_collectives_in_a_condition_run_once_more():
    program = """HloModule loop, num_partitions=8

%body (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  ROOT %b = f32[4] collective-permute(%x), source_target_pairs={{0,1}}
}

%condition (y: f32[4]) -> pred[] {
  %y = f32[4] parameter(0)
  %c = f32[4] all-reduce(%y), replica_groups={}, to_apply=%add
  ROOT %less = pred[] custom-call(%c), custom_call_target="less"
}

ENTRY %main (z: f32[4]) -> f32[4] {
  %z = f32[4] parameter(0)
  ROOT %w = f32[4] while(%z), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert {item.kind: item.runs for item in compiled.collectives(program)} == {
        "collective-permute": 5,
        "all-reduce": 6,
    }
