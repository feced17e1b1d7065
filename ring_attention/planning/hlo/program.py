"""The text of a compiled program, as computations of instructions."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ENTRY = "ENTRY"

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
_ITEM_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_ITEM_BYTES) + r")\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?(%[\w.\-]+) = (.*)")
_OPERATION = re.compile(r"(.*?) ([a-z][\w\-]*)\(", re.DOTALL)
_NAME = re.compile(r"%[\w.\-]+")
_CALLED = re.compile(r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_NO_CALLS = ("async-update", "async-done")  # older texts repeat there what the start calls


class Array(NamedTuple):
    """One array of a program, on one device: its dtype, as HLO names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return self.size * _ITEM_BYTES[self.dtype]


class Instruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
      name: with its percent sign.
      result: type and layout of what it gives, as text.
      opcode: such as "fusion".
      arguments: what stands between its parentheses.
      attributes: what stands after them.
      root: whether it gives what its computation gives.
    """

    name: str
    result: str
    opcode: str
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """The names of the instruction's operands."""
        return _NAME.findall(self.arguments)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that the instruction gives, tuples flattened."""
        return tuple(array for array, _ in placed_arrays(self.result))

    @property
    def called(self) -> dict[str, str]:
        """The computations that the instruction calls -> as what: "body", "condition", "calls", "branch", ..."""
        if self.opcode in _NO_CALLS:
            return {}
        names = {name: role for role, name in _CALLED.findall(self.attributes)}
        for listed in _CALLED_LISTS.findall(self.attributes):
            names |= dict.fromkeys((name.strip().lstrip("%") for name in listed.split(",")), "branch")
        return names

    def attribute(self, pattern: str) -> str | None:
        """Find the first group of a pattern in the attributes; None where it is not there."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


def placed_arrays(text: str) -> Iterator[tuple[Array, int]]:
    """Find the arrays that a text names, each with the number of the memory it lies in; 0 is the device's HBM."""
    for dtype, dims, space in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(d) for d in dims.split(",") if d)), int(space or 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program as computations of instructions.

    Attributes:
      header: its first line.
      computations: name -> instructions by name, in the order they run; called computations stand before their
        callers, and the entry is called ENTRY.
    """

    header: str
    computations: dict[str, dict[str, Instruction]]

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Parse a program's `as_text()`; raises ValueError for another text."""
        pieces, current = collections.defaultdict(list), None
        for line in text.splitlines():
            if match := COMPUTATION.match(line):
                current = ENTRY if match[1] else match[2]
                pieces[current] = []
            elif line == "}":
                current = None
            elif current is not None and (match := INSTRUCTION.match(line)):
                pieces[current].append((match[2], bool(match[1]), [match[3]]))
            elif current is not None and pieces[current]:  # a kernel's own text may take several lines
                pieces[current][-1][2].append(line)
        if ENTRY not in pieces:
            raise ValueError("this is not a compiled program in HLO; pass jax.jit(f).lower(...).compile().as_text()")
        found = {name: [_instruction(*piece) for piece in body] for name, body in pieces.items()}
        return cls(
            header=text.partition("\n")[0],
            computations={name: {x.name: x for x in body if x is not None} for name, body in found.items()},
        )

    @functools.cached_property
    def callers(self) -> dict[str, list[tuple[str, Instruction]]]:
        """The calls of each computation: (the computation that it is called in, the instruction that calls it)."""
        found = collections.defaultdict(list)
        for name, body in self.computations.items():
            for instruction in body.values():
                for called in instruction.called:
                    found[called].append((name, instruction))
        return found

    @functools.cached_property
    def scheduled(self) -> set[str]:
        """The computations whose instructions run one by one: all but those within fusions, reductions and the like."""
        found, waiting = set(), [ENTRY]
        while waiting:
            found.add(name := waiting.pop())
            for instruction in self.computations[name].values():
                if instruction.opcode in ("while", "conditional", "call", "async-start"):
                    waiting += [x for x in instruction.called if x in self.computations and x not in found]
        return found

    def root(self, name: str) -> Instruction:
        """Find the instruction whose result a computation gives."""
        body = self.computations[name]
        return next((x for x in body.values() if x.root), next(reversed(body.values())))


def _instruction(name: str, root: bool, lines: list[str]) -> Instruction | None:
    text = "\n".join(lines)
    if (match := _OPERATION.match(text)) is None:
        return None
    depth, end = 1, len(text)
    for bracket in re.compile(r"[()]").finditer(text, match.end()):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            end = bracket.start()
            break
    return Instruction(name, match[1], match[2], text[match.end() : end], text[end + 1 :], root)
