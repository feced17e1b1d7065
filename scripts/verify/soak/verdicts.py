"""What a run must have left after a fault, and how to see that it did not."""

import dataclasses
import json
import math
from collections.abc import Sequence

HANG, CORRUPTED, LOSSES, LOST, EXIT, MESSAGE = SORTS = (
    *("hang", "corrupted state", "wrong losses", "lost too much", "wrong exit", "wrong message"),
)
"""What can go wrong: a deadline passes; a run cannot go on with its folder; losses are not the reference's; more steps
are lost than promised; a process does not end as promised; an error does not say what it should."""

Line = dict[str, float | int | None]


@dataclasses.dataclass
class Outcome:
    """Result of one fault: when, in which run and step, steps lost of those allowed, SIGKILLs, words, problems."""

    kind: str
    seconds: float = 0.0
    run: str = ""
    step: int = 0
    lost: int | None = None
    bound: int = 0
    kills: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def require(self, condition: bool, sort: str, text: str) -> None:
        """Count a problem unless `condition`."""
        if not condition:
            self.problems.append((sort, text))

    def require_lost(self, done: int, resumed: int) -> None:
        """Take in that a run which had done step `done` went on from `resumed`; a problem beyond `bound`."""
        self.lost = max(0, done - resumed)
        text = f"step {done} was done, went on from {resumed}: {self.lost} lost, at most {self.bound} allowed"
        self.require(self.lost <= self.bound, LOST, text)
        self.notes.append(f"went on from {resumed}, {self.lost} lost")

    def require_lines(self, got: Sequence[Line], want: Sequence[Line]) -> None:
        """Count a problem unless the lines of a run are the reference's first ones, bit for bit."""
        difference = first_difference(got, want)
        self.require(difference is None, LOSSES, f"{difference}")


def first_difference(got: Sequence[Line], want: Sequence[Line]) -> str | None:
    """Return how `got` first differs from the beginning of `want`, the speed aside; None if it does not."""
    for ours, reference in zip(got, want, strict=False):
        for name in [*reference, *ours]:  # Python prints floats with just enough digits to tell all bits
            got_bits, want_bits = (json.dumps(line.get(name, "absent")) for line in (ours, reference))
            if name != "tokens_per_second" and got_bits != want_bits:
                return f"step {ours['step']}: {name}={got_bits}, in the undisturbed run {want_bits}"
    if len(got) > len(want):
        return f"step {got[len(want)]['step']}: a line that the undisturbed run does not have"
    return None


def worst_relative_difference(got: Sequence[Line], want: Sequence[Line], after: int) -> float:
    """Return the largest |a - b| / |b| of losses past step `after`; infinite if there is none or one is missing."""
    ours, reference = ({line["step"]: line["loss"] for line in lines if "loss" in line} for lines in (got, want))
    steps = [step for step in ours if step > after]
    if not steps or any(ours[step] is None or step not in reference for step in steps):
        return math.inf
    return max(abs(ours[step] - reference[step]) / abs(reference[step]) for step in steps)


def read_lines(text: str) -> list[Line]:
    """Parse a metrics.jsonl; a last line without its end, which a killed process may leave, is left out.

    Raises:
      ValueError: for any other line that is not a JSON object with a step.
    """
    parsed = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            parsed.append(dict(json.loads(line)))
            int(parsed[-1]["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"metrics.jsonl:{number}: {line[:60]!r} is no line of metrics") from error
    return parsed
