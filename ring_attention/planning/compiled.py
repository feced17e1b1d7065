"""Reads a compiled program: which collectives it runs, how often, how large, beside what, and what arrays it holds."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
_ITEM_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_ITEM_BYTES) + r")\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(?:-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]<=)")
_DEVICES = re.compile(r"(?:num_partitions|replica_count)=(\d+)")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (.*)")
_DONE = re.compile(r"(.*) collective-permute-done\((?:\S+ )?(%[\w.\-]+)\)")
_WORK = re.compile(r"(.*?) (?:fusion|convolution|dot)\(%")  # of something, so not the filling of an array
_HOP = re.compile(
    r' (?:while|conditional)\(|custom_call_target="(?:tpu_custom_call|__cudnn\$fmha|[^"]*triton|[^"]*mosaic)'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """dtype (as HLO names it) and shape of one array of the program, on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.size * _ITEM_BYTES[self.dtype]


class Collective(NamedTuple):
    """A collective instruction of the program.

    Attributes:
      kind: one of KINDS.
      arrays: what it gives one device each time it runs.
      runs: how often it runs each time the program does, loops multiplied out.
      group: how many devices take part together; for a permute, how many there are.
    """

    kind: str
    arrays: tuple[Array, ...]
    runs: int
    group: int = 1

    @property
    def bytes(self) -> int:
        """Bytes that it gives one device, over all its runs."""
        return self.runs * sum(array.bytes for array in self.arrays)

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
class Schedule:
    """The permutes in the text of a compiled program, where one in a loop counts once.

    Attributes:
      asynchronous: permutes that start in one place and are awaited in another.
      hidden: those between whose two places a hop is computed: a loop over tiles, or a kernel, stands there.
      beside_other_work: of the rest those between whose two places something is computed that is no smaller than what
        is sent, such as the merging of what a hop gave.
      synchronous: permutes that nothing else can run beside.
      exposed: those that a device can only wait for: synchronous ones and the rest.
      exposed_bytes: of those.
      bytes_in_flight: the most that is on its way to one device at any one time.
    """

    asynchronous: int
    hidden: int
    beside_other_work: int
    synchronous: int
    exposed: int
    exposed_bytes: int
    bytes_in_flight: int


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, given its `as_text()`.

    Raises:
      ValueError: if one stands in a loop whose number of turns the compiler does not state, or `text` is no HLO.
    """
    bodies = _computations(text)
    runs, devices = _runs(bodies), math.prod(int(n) for n in _DEVICES.findall(text[: text.find("\n")]))
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if match := _COLLECTIVE.search(line):
                if runs[name] is None:
                    raise ValueError(f"a collective runs in a loop of unknown length: {line.strip()[:120]}")
                arrays, kind = tuple(_arrays(match[1])), match[2]
                if "-start(" in line and kind != "all-reduce":  # (operands, results, contexts): keep the results
                    operands = line[match.end() :].split("), ")[0].count("%")
                    arrays = arrays[operands : 2 * operands] or arrays
                found.append(Collective(kind, arrays, runs[name], _group(line) or devices))
    return found


def sent(text: str) -> int:
    """Bytes that one device sends in a compiled program, over all its collectives; see `Collective.sent`."""
    return sum(item.sent for item in collectives(text))


def totals(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> (runs, bytes given to one device), for the collectives that the program has."""
    sums = collections.defaultdict(lambda: (0, 0))
    for item in collectives(text):
        runs, size = sums[item.kind]
        sums[item.kind] = (runs + item.runs, size + item.bytes)
    return dict(sums)


def schedule_of(text: str) -> Schedule:
    """How the permutes of a compiled program, given its `as_text()`, lie beside its computation."""
    blocking = re.findall(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*) collective-permute\(", text, re.MULTILINE)
    synchronous = exposed = len(blocking)
    exposed_bytes = sum(array.bytes for result in blocking for array in _arrays(result))
    found = [done for done in map(_DONE.search, text.splitlines()) if done]
    sizes = {done[2]: sum(array.bytes for array in _arrays(done[1])) for done in found}
    asynchronous = hidden = beside = most = hops = 0
    waiting: dict[str, int] = {}  # name of a start -> hops before it
    largest: dict[str, int] = {}  # name of a start -> bytes of the largest array computed since
    blocked: set[str] = set()  # names of starts that block
    for line in text.splitlines():
        if _COMPUTATION.match(line):
            waiting, hops = {}, 0
        elif (instruction := _INSTRUCTION.match(line)) is None:
            continue  # a kernel's own text may take several lines
        elif " collective-permute-start(" in line:
            waiting[instruction[1]], largest[instruction[1]] = hops, 0
            at_once = '"is_sync":true' in line
            synchronous, asynchronous = synchronous + at_once, asynchronous + (not at_once)
            blocked |= {instruction[1]} if at_once else set()
            most = max(most, sum(sizes[name] for name in waiting))
        elif done := _DONE.search(line):
            name, free = done[2], done[2] not in blocked
            behind_hop = free & (hops > waiting.pop(name))
            beside_work = free & (not behind_hop) & (largest[name] >= sizes[name])
            hidden, beside = hidden + behind_hop, beside + beside_work
            if not (behind_hop or beside_work):
                exposed, exposed_bytes = exposed + 1, exposed_bytes + sizes[name]
        elif work := _WORK.match(instruction[2]):
            size = max((array.bytes for array in _arrays(work[1])), default=0)
            largest |= {name: max(largest[name], size) for name in waiting}
        hops += _HOP.search(line) is not None
    return Schedule(
        asynchronous=asynchronous,
        hidden=hidden,
        beside_other_work=beside,
        synchronous=synchronous,
        exposed=exposed,
        exposed_bytes=exposed_bytes,
        bytes_in_flight=most,
    )


def arrays(text: str) -> set[Array]:
    """Every array that an instruction of the program makes, fusions' inner values included."""
    return set(_arrays(text))


def _group(line: str) -> int | None:
    """Devices of the first of a collective's groups; None where it names none, which means all."""
    if match := _GROUPS.search(line):
        return match[1].count(",") + 1 if match[1] else int(match[2])
    return None


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(d) for d in dims.split(",") if d))


def _computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of each computation; the entry is called "ENTRY"."""
    bodies, current = {}, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = "ENTRY" if match[1] else match[2]
            bodies[current] = []
        elif current is not None:
            bodies[current].append(line)
    if "ENTRY" not in bodies:
        raise ValueError("this is not a compiled program in HLO; pass jax.jit(f).lower(...).compile().as_text()")
    return bodies


def _runs(bodies: dict[str, list[str]]) -> dict[str, int | None]:
    """How often each computation runs in one run of the program; None where a loop's length is unknown.

    A branch of a conditional counts as run. Called computations stand before their callers in the text.
    """
    runs: dict[str, int | None] = dict.fromkeys(bodies, 0)
    runs["ENTRY"] = 1
    for name in reversed(bodies):
        for line in bodies[name]:
            names = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                names += [branch.strip().lstrip("%") for branch in branches.split(",")]
            times = 1
            if " while(" in line:
                trips = _TRIPS.search(line)
                times = int(trips[1]) if trips else None
            for called in names:
                here, before = runs[name], runs[called]
                unknown = here is None or times is None or before is None
                runs[called] = None if unknown else before + here * times
    return runs
