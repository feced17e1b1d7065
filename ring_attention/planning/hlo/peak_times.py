"""The least time that the instructions of a compiled program can take: a chip's, at its published peak.

An instruction takes its operations at the chip's peak, or its bytes at the bandwidth of the HBM, whichever is longer.
Operations are those of matrix products: of dots, convolutions, and kernels that are known or state them. Arrays that
lie in a TPU's on-chip memory move no bytes of the HBM, and of an array that is sliced only the slice does.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from ring_attention.hardware.chips import Chip
from ring_attention.planning.hlo.compiled import KINDS
from ring_attention.planning.hlo.loops import trips_of
from ring_attention.planning.hlo.program import Array, Instruction, Program, placed_arrays

_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "send",
    "recv",
)
_SLICES = ("slice", "dynamic-slice", "gather")
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|__cu|[^"]*triton|[^"]*mosaic)')
_STATED_FLOPS = r'"cost_estimate":\{"flops":"(\d+)"'
_SCORES = r'"intermediate_tensor_shape": ?\{[^{}]*"dimensions": ?\[([^\]]*)\]'


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number of seconds, and how many loops of unknown length it counts as one turn."""

    seconds: float = 0.0
    unknown_loops: int = 0

    def __add__(self, other: "Estimate") -> "Estimate":
        """The estimate of both, one after the other."""
        return Estimate(self.seconds + other.seconds, self.unknown_loops + other.unknown_loops)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The estimate of what came after `other`."""
        return Estimate(self.seconds - other.seconds, self.unknown_loops - other.unknown_loops)


class PeakTimes:
    """Estimates of the least time that a chip needs for parts of a program."""

    def __init__(self, program: Program, chip: Chip):
        self.program, self.chip = program, chip
        self.of_computation = functools.cache(self._of_computation)

    def of(self, name: str, instruction: Instruction) -> Estimate:
        """Estimate the least that an instruction of the computation `name` takes.

        A collective or a wait takes none. A conditional takes what its longest branch does: devices of a ring may take
        different ones, and those that are done wait for the others. A loop of unknown length counts as one turn.
        """
        opcode, called = instruction.opcode, instruction.called
        if opcode in ("call", "async-start", "conditional"):
            branches = [self.of_computation(x) for x in called if x in self.program.computations]
            return max(branches, key=lambda x: x.seconds, default=Estimate())
        if opcode == "while":
            body = next(x for x, role in called.items() if role == "body")
            trips = trips_of(self.program, instruction)
            turn = self.of_computation(body)
            unknown = turn.unknown_loops + (trips is None)
            return Estimate(turn.seconds * (1 if trips is None else trips), unknown)
        if opcode in _FREE or opcode in KINDS or opcode.endswith(("-start", "-update", "-done")):
            return Estimate()
        if opcode == "custom-call" and not _KERNEL.search(instruction.attributes):
            return Estimate()
        flops = flops_of(self.program, name, instruction)
        if opcode == "fusion" and not flops and self._is_collective(instruction):
            return Estimate()
        return Estimate(max(flops / self.chip.flops, self._bytes(name, instruction) / self.chip.memory_bandwidth))

    def _of_computation(self, name: str) -> Estimate:
        """Estimate the least that all instructions of a computation take."""
        return sum((self.of(name, x) for x in self.program.computations[name].values()), Estimate())

    def _is_collective(self, fusion: Instruction) -> bool:
        inner = self.program.computations[next(iter(fusion.called))]
        return any(x.opcode in KINDS for x in inner.values())

    def _in_hbm(self, result: str) -> list[tuple[Array, int]]:
        """List the arrays of a type, each with its bytes of HBM."""
        on_chip = self.chip.platform == "tpu"
        return [(array, 0 if on_chip and space else array.bytes) for array, space in placed_arrays(result)]

    def _size(self, name: str, value: str) -> int:
        made = self.program.computations[name].get(value)
        return sum(size for _, size in self._in_hbm(made.result)) if made else 0

    def _bytes(self, name: str, instruction: Instruction) -> int:
        """Count the bytes that an instruction reads from the HBM and writes to it."""
        if instruction.opcode == "fusion":
            return self._fused_bytes(name, instruction)
        result = sum(size for _, size in self._in_hbm(instruction.result))
        if instruction.opcode in _SLICES:
            return 2 * result
        if instruction.opcode == "dynamic-update-slice":
            return 2 * self._size(name, instruction.operands[1])
        return result + sum(self._size(name, operand) for operand in instruction.operands)

    def _fused_bytes(self, name: str, fusion: Instruction) -> int:
        inner = next(iter(fusion.called))
        body, root = self.program.computations[inner], self.program.root(inner)
        users = collections.defaultdict(list)
        for x in body.values():
            for operand in x.operands:
                users[operand].append(x)
        total = 0
        for x in body.values():
            if x.opcode == "parameter" and (number := int(x.arguments)) < len(fusion.operands):
                whole = self._size(name, fusion.operands[number])
                total += min(whole, _read(x, users))
        made = [body.get(x) for x in root.operands] if root.opcode == "tuple" else [root]
        for x, (_, size) in zip(made, self._in_hbm(fusion.result), strict=False):
            total += min(size, _written(x, body)) if x else size
        return total


def _read(value: Instruction, users: dict[str, list[Instruction]]) -> int:
    """Count the bytes that a fusion reads of a parameter."""
    total = 0
    for user in users[value.name]:
        sliced = user.opcode in _SLICES and user.operands[0] == value.name
        if sliced:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "bitcast":
            total += _read(user, users)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # written in place
        elif user.opcode not in ("tuple", "custom-call", *KINDS):
            return sum(array.bytes for array in value.arrays)
    return total


def _written(value: Instruction, body: dict[str, Instruction]) -> int:
    """Count the bytes that a fusion writes of one of its results."""
    while value.opcode == "bitcast" and value.operands[0] in body:
        value = body[value.operands[0]]
    if value.opcode in ("parameter", "custom-call", *KINDS):
        return 0
    if value.opcode == "dynamic-update-slice" and value.operands[1] in body:
        value = body[value.operands[1]]
    return sum(array.bytes for array in value.arrays)


def flops_of(program: Program, name: str, instruction: Instruction) -> float:
    """Count operations of matrix products in an instruction of the computation `name`, and in what it calls."""
    body = program.computations[name]
    if instruction.opcode == "fusion":
        (inner,) = instruction.called
        return sum(flops_of(program, inner, x) for x in program.computations[inner].values())
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    operands = [body[x].arrays[0] for x in instruction.operands if x in body and body[x].arrays]
    attributes = instruction.attributes
    if instruction.opcode == "custom-call":
        if stated := instruction.attribute(_STATED_FLOPS):
            return float(stated)
        if "__cudnn$fmha" in attributes:
            return _fmha_flops(instruction, operands)
        if "__cublas$" not in attributes:
            return 0.0
        attributes = re.sub(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]', r"lhs_contracting_dims={\1}", attributes)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, operands)
    contracted = re.search(r'lhs_contracting_dims=\{([\d,"\s]*)\}', attributes)
    sizes = [operands[0].shape[int(d)] for d in re.findall(r"\d+", contracted[1])]
    return 2.0 * instruction.arrays[0].size * math.prod(sizes)


def _fmha_flops(kernel: Instruction, operands: list[Array]) -> float:
    """Count two products forward and five backward, of the scores that the mask leaves."""
    B, H, T, S = (int(d) for d in re.findall(r"\d+", kernel.attribute(_SCORES)))
    causal = "CAUSAL" in (kernel.attribute(r'"mask_type": ?"(\w+)"') or "")
    window = int(kernel.attribute(r'"sliding_window_length": ?(\d+)') or 0)
    pairs = min(T * S / (2 if causal else 1), T * window if window else math.inf)
    products = 5 if "Backward" in kernel.attributes else 2
    return 2.0 * products * B * H * pairs * operands[0].shape[-1]


def _convolution_flops(convolution: Instruction, operands: list[Array]) -> float:
    """Count the products within the input, without those of padding: a TPU's dots are such convolutions."""
    left, right, out = re.split(r"_|->", convolution.attribute(r"dim_labels=([\w>\-]+)"))
    (lhs, rhs, result) = (x.shape for x in (*operands[:2], convolution.arrays[0]))
    total = 2.0 * result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")]
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", convolution.attribute(r"window=\{([^}]*)\}") or ""))
    for axis in range(len(left) - 2):
        part = {name: value.split("x")[axis] for name, value in fields.items()}
        stride, spread, gaps = (int(part.get(x, 1)) for x in ("stride", "rhs_dilate", "lhs_dilate"))
        padding = int(part.get("pad", "0_0").split("_")[0])
        sizes = (shape[labels.index(str(axis))] for shape, labels in ((result, out), (rhs, right), (lhs, left)))
        outputs, taps, inputs = sizes
        places = np.add.outer(np.arange(outputs) * stride, np.arange(taps) * spread) - padding
        total *= int(((places >= 0) & (places <= (inputs - 1) * gaps) & (places % gaps == 0)).sum())
    return total
