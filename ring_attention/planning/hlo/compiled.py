"""Reads a compiled program: which collectives it runs, how often, how large, and what arrays it holds."""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

import jax
import numpy as np

from ring_attention.planning.hlo.loops import runs_of
from ring_attention.planning.hlo.program import Array, Instruction, Program, placed_arrays

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")

_DEVICES = re.compile(r"(?:num_partitions|replica_count)=(\d+)")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_OF_MESH = re.compile(
    r"replica_groups=mesh\[('[^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}"
)
_BETWEEN_SLICES = r'_xla_megascale_transfer_type="(\w+)"'
_SLICES = r'_xla_megascale_target="\{([\d,:]+)\}'
_KIND_BETWEEN_SLICES = {"ONE_TO_ONE": "collective-permute"}
"""Of transfers that libtpu calls otherwise than XLA its collectives: "ALL_REDUCE" is an all-reduce."""


class Collective(NamedTuple):
    """A collective instruction of the program.

    Attributes:
      kind: one of KINDS.
      arrays: what one device gets each time it runs.
      runs: how often it runs each time the program does, loops multiplied out; None in a loop of unknown length, and
        its bytes are then those of one run.
      group: how many devices take part together; for a permute, how many there are.
      name: of its instruction.
      groups: the devices of each group; of a permute, the pairs of sender and receiver. Empty where the program states
        them in a form that is not known here.
      between_slices: whether it goes from one slice of TPUs to others; the program is that of one slice, whose devices
        are numbered from 0, and `groups` is empty.
    """

    kind: str
    arrays: tuple[Array, ...]
    runs: int | None
    group: int = 1
    name: str = ""
    groups: tuple[tuple[int, ...], ...] = ()
    between_slices: bool = False

    @property
    def bytes(self) -> int:
        """Bytes that it gives one device, over all its runs."""
        return (1 if self.runs is None else self.runs) * sum(array.bytes for array in self.arrays)

    @property
    def sent(self) -> int:
        """Bytes that one device sends over all its runs, by the algorithm that sends the fewest.

        An all-gather's own part stays, and so does an all-to-all's; an all-reduce is a reduce-scatter and an
        all-gather.
        """
        others = self.group - 1
        if self.kind == "reduce-scatter":
            return self.bytes * others
        times = {"all-reduce": 2, "all-gather": 1, "all-to-all": 1}.get(self.kind)
        return self.bytes if times is None else times * self.bytes * others // self.group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a program takes on one device, as its compiler states them.

    Attributes:
      arguments, outputs: of the program.
      aliased: of the outputs that lie in an argument's place, as donated ones do.
      temporaries: everything between.
      code: the program itself.
      host: arguments, outputs and temporaries that lie in the host's memory.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host: int

    @property
    def total(self) -> int:
        """Bytes that a device's HBM must hold while the program runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def memory_of(program: jax.stages.Compiled) -> Memory:
    """Read the memory that a compiled program takes."""
    found = program.memory_analysis()
    on_host = found.host_argument_size_in_bytes + found.host_output_size_in_bytes + found.host_temp_size_in_bytes
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        host=on_host - found.host_alias_size_in_bytes,
    )


def collectives(text: str) -> list[Collective]:
    """List the collectives of a compiled program, given its `as_text()`.

    Raises:
      ValueError: if one stands in a loop whose number of turns cannot be told, or `text` is no HLO.
    """
    found = collectives_in(Program.parse(text))
    for item in found:
        if item.runs is None:
            raise ValueError(f"a collective runs in a loop of unknown length: {item.kind} {item.name}")
    return found


def collectives_in(program: Program) -> list[Collective]:
    """List the collectives of a program, those in loops of unknown length too.

    A TPU's compiler runs an all-gather in pieces beside several fusions, each of which names it; it counts where it
    starts. What it calls all-reduce-scatter is a fusion of an all-reduce and the slice that is kept of its result.
    What slices of TPUs exchange goes by their hosts: each device sends to its own, and receives from it.
    """
    runs, devices = runs_of(program), math.prod(int(n) for n in _DEVICES.findall(program.header))
    found = []
    for name, body in program.computations.items():
        for instruction in body.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind == "recv" and (between := _between_slices(instruction, runs[name])):
                found.append(between)
            if kind not in KINDS or not _starts(instruction, body):
                continue
            arrays = instruction.arrays
            if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, contexts)
                operands = len(instruction.operands)
                arrays = arrays[operands : 2 * operands] or arrays
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind, arrays = "reduce-scatter", program.root(name).arrays
            groups = _groups(instruction.attributes, devices)
            group = devices if kind == "collective-permute" or not groups else len(groups[0])
            found.append(Collective(kind, arrays, runs[name], group, instruction.name, groups))
    return found


def _between_slices(instruction: Instruction, runs: int | None) -> Collective | None:
    """Read what arrives from other slices of TPUs, if that is what an instruction waits for."""
    name = instruction.attribute(_BETWEEN_SLICES)
    if name is None:
        return None
    spans = [part.split(":") for part in (instruction.attribute(_SLICES) or "1,2").split(",")]
    slices = sum(int(span[-1]) - int(span[0]) + 1 for span in spans)
    kind = _KIND_BETWEEN_SLICES.get(name, name.lower().replace("_", "-"))
    return Collective(kind, instruction.arrays[:1], runs, slices, instruction.name, between_slices=True)


def sent(text: str) -> int:
    """Add up the bytes that one device sends in a compiled program, by all its collectives; see `Collective.sent`."""
    return sum(item.sent for item in collectives(text))


def totals(text: str) -> dict[str, tuple[int, int]]:
    """Add up the collectives of a program by kind: kind -> (runs, bytes given to one device)."""
    sums = collections.defaultdict(lambda: (0, 0))
    for item in collectives(text):
        runs, size = sums[item.kind]
        sums[item.kind] = (runs + item.runs, size + item.bytes)
    return dict(sums)


def arrays(text: str) -> set[Array]:
    """List every array that an instruction of the program makes, values within fusions included."""
    return {array for array, _ in placed_arrays(text)}


def _starts(instruction: Instruction, body: dict[str, Instruction]) -> bool:
    """Whether this is the whole of a collective or its first piece."""
    if instruction.attribute(r'chain_id="(\d+)"') is None:
        return True
    return any("AsyncCollectiveStart" in x.attributes and instruction.name in x.operands for x in body.values())


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Read the groups of a collective, or the pairs of a permute."""
    if listed := _LISTED.search(attributes):
        return tuple(tuple(map(int, group.split(","))) for group in listed[1].strip("{}").split("},{"))
    if iota := _IOTA.search(attributes):
        return _split(_numbered(iota[2], iota[3]), int(iota[1]))
    if mesh := _OF_MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        over = re.findall(r"'([^']+)'", mesh[4])
        order = [i for part in (False, True) for i, name in enumerate(sizes) if (name in over) == part]
        numbers = _numbered(mesh[2] or ",".join(map(str, sizes.values())), mesh[3]).reshape([*sizes.values()])
        return _split(numbers.transpose(order), math.prod(sizes[name] for name in over))
    if "replica_groups={}" in attributes or "replica_groups=" not in attributes:
        return (tuple(range(devices)),)
    return ()


def _numbered(dims: str, order: str | None) -> np.ndarray:
    """Number the devices in the order that a program states: a shape, and the axes it is transposed by."""
    shape = [int(d) for d in dims.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose([int(d) for d in order.split(",")]) if order else numbers


def _split(devices: np.ndarray, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, group)) for group in devices.reshape(-1, size))
