import re

import jax
import jax.numpy as jnp
import pytest
from hlo_texts import HEAD, MESH, RING, V5E
from jax import lax
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.planning.hlo import compiled
from ring_attention.planning.hlo.loops import trips_of
from ring_attention.planning.hlo.program import Program
from ring_attention.planning.hlo.transfers import collectives_by_axis, transfers


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
def test_trips_of_follow_from_start_step_and_bound(program, trips):
    (row,) = collectives_by_axis(program, MESH)
    assert (row.runs, row.instructions, row.bytes) == (trips, 1, 32 * (1 if trips is None else trips))
    (found,) = transfers(program, V5E, MESH)
    assert (found.runs, found.asynchronous, found.compute_seconds) == (trips, False, 0)
    assert found.exposed_seconds == pytest.approx(32 / 45e9)
    assert found.link_seconds - found.exposed_seconds == 0
    if trips is None:
        assert "runs unknown" in str(row)
        with pytest.raises(ValueError, match="unknown length: collective-permute %y"):
            compiled.collectives(program)


def test_trips_of_derives_what_a_compiler_states():
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
