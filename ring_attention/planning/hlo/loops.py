"""How often loops turn in a compiled program, and with that how often each of its computations runs."""

import re
from typing import NamedTuple

from ring_attention.planning.hlo.program import ENTRY, Instruction, Program

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PLANNED = re.compile(r'op_name="[^"]*planned_(\d+)/while"')
_SAME = ("copy", "bitcast", "copy-start", "copy-done", "optimization-barrier")


def runs_of(program: Program) -> dict[str, int | None]:
    """Count how often each computation runs in one run of the program; None where a loop's length is unknown.

    A branch of a conditional counts as run.
    """
    runs: dict[str, int | None] = dict.fromkeys(program.computations, 0)
    runs[ENTRY] = 1
    for name in reversed(program.computations):
        for instruction in program.computations[name].values():
            times = trips_of(program, instruction) if instruction.opcode == "while" else 1
            for called, role in instruction.called.items():
                here, before = runs[name], runs.get(called, 0)
                unknown = None in (here, times, before)
                runs[called] = None if unknown else before + here * (times + (role == "condition"))
    return runs


def trips_of(program: Program, loop: Instruction) -> int | None:
    """Count the turns of a `while`; None where they cannot be told.

    They are stated (GPU, CPU), or the loop counts: its condition compares an element of what it carries with a number,
    the element starts as a number, and each turn adds a number to it. A loop whose length is data, as that of a ring
    which counts its hops, counts as its name says: as for a row that one document fills.
    """
    if stated := _TRIPS.search(loop.attributes) or _PLANNED.search(loop.attributes):
        return int(stated[1])
    return _counted(program, loop) if _role(loop, "condition") in program.computations else None


class _Carried(NamedTuple):
    """An element of what a loop carries, as it is when a turn begins."""

    loop: Instruction
    where: str  # the computation that the loop stands in
    index: int


def _source(program: Program, name: str, value: str) -> tuple[str, Instruction] | _Carried | None:
    """Find where a value of the computation `name` is made, or which element of a loop it is; None if not clear."""
    for _ in range(100):
        instruction = program.computations[name].get(value)
        if instruction is None:
            return None
        if instruction.opcode in _SAME:
            value = instruction.operands[0]
        elif instruction.opcode == "fusion" and len(instruction.arrays) == 1:
            name = next(iter(instruction.called))
            value = program.root(name).name
        elif instruction.opcode == "parameter":
            (caller, called_by), *others = program.callers[name] or [(None, None)]
            if others or called_by is None or called_by.opcode not in ("fusion", "call"):
                return None
            name, value = caller, called_by.operands[int(instruction.arguments)]
        elif instruction.opcode == "get-tuple-element":
            step = _element(program, name, instruction)
            if step is None or isinstance(step, _Carried):
                return step
            name, value = step
        else:
            return name, instruction
    return None


def _element(program: Program, name: str, instruction: Instruction) -> tuple[str, str] | _Carried | None:
    """Find what a get-tuple-element takes: a value of some computation, or an element that a loop carries."""
    index = int(instruction.attribute(r"index=(\d+)"))
    made = program.computations[name].get(instruction.operands[0])
    if made is None:
        return None
    if made.opcode == "tuple":
        return name, made.operands[index]
    if made.opcode == "fusion":
        inner = next(iter(made.called))
        root = program.root(inner)
        return (inner, root.operands[index]) if root.opcode == "tuple" else None
    if made.opcode == "parameter" and len(program.callers[name]) == 1:
        ((where, loop),) = program.callers[name]
        return _Carried(loop, where, index) if loop.opcode == "while" else None
    return None


def _role(loop: Instruction, role: str) -> str:
    return next(name for name, found in loop.called.items() if found == role)


def _initial(program: Program, carried: _Carried) -> tuple[str, str] | None:
    made = _source(program, carried.where, carried.loop.operands[0])
    if made is None or isinstance(made, _Carried) or made[1].opcode != "tuple":
        return None
    return made[0], made[1].operands[carried.index]


def _next(program: Program, carried: _Carried) -> tuple[str, Instruction] | _Carried | None:
    """Find what an element is when a turn ends."""
    body = _role(carried.loop, "body")
    root = program.root(body)
    return _source(program, body, root.operands[carried.index]) if root.opcode == "tuple" else None


def _number(program: Program, name: str, value: str) -> int | None:
    """Find the number that a value always is; None where it is none, or not clear."""
    found = _source(program, name, value)
    while isinstance(found, _Carried):  # what no turn changes is what it was before the loop
        before = _initial(program, found) if _next(program, found) == found else None
        found = _source(program, *before) if before else None
    if found is None or found[1].opcode != "constant" or not re.fullmatch(r"-?\d+", found[1].arguments):
        return None
    return int(found[1].arguments)


def _counted(program: Program, loop: Instruction) -> int | None:
    condition = _role(loop, "condition")
    compared = _source(program, condition, program.root(condition).name)
    if compared is None or isinstance(compared, _Carried) or compared[1].opcode != "compare":
        return None
    where, compare = compared
    direction = compare.attribute(r"direction=(\w+)")
    sides = [_source(program, where, side) for side in compare.operands]
    index = next((i for i, x in enumerate(sides) if isinstance(x, _Carried) and _moves(program, x)), None)
    if index is None:
        return None
    counter, bound = sides[index], _number(program, where, compare.operands[1 - index])
    if index == 1:
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    initial = _initial(program, counter)
    first, step = initial and _number(program, *initial), _step(program, counter)
    if counter.loop is not loop or None in (bound, first, step):
        return None
    last = bound + {"LE": 1, "GE": -1}.get(direction, 0)
    upward = {"LT": True, "LE": True, "GT": False, "GE": False}.get(direction)
    if upward is None or (step > 0) != upward:
        return None
    return max(0, -((first - last) // step)) if upward else max(0, -((last - first) // -step))


def _moves(program: Program, carried: _Carried) -> bool:
    return _next(program, carried) != carried


def _step(program: Program, carried: _Carried) -> int | None:
    """Find what a turn adds to an element; None where it does something else."""
    found = _next(program, carried)
    if found is None or isinstance(found, _Carried) or found[1].opcode not in ("add", "subtract"):
        return None
    name, made = found
    first, second = made.operands
    if made.opcode == "add" and _source(program, name, second) == carried:
        first, second = second, first
    if _source(program, name, first) != carried or (size := _number(program, name, second)) is None:
        return None
    return (size if made.opcode == "add" else -size) or None
