"""Documents that cannot be used: what is wrong with one, and the account of those that were left out."""

import dataclasses
import enum
from collections.abc import Callable


class Reason(enum.StrEnum):
    """The reasons for which a document is left out."""

    EMPTY = "empty"
    UNREADABLE = "unreadable"
    FORMAT = "in another format"
    NOT_UTF8 = "not UTF-8"
    BINARY = "binary"
    TOO_LONG = "too long"
    NOT_JSON = "no JSON object"
    WITHOUT_FIELD = "without the text field"
    NOT_TEXT = "no string in the text field"
    HALF_A_CHARACTER = "half a surrogate pair"


class BadDocumentError(Exception):
    """A document that cannot be used.

    Attributes:
      reason: the kind of fault.
      problem: the name of the document and what is wrong with it, in one line.
      remedy: what to do.
      field: the field of DataConfig that is to blame.
    """

    def __init__(self, reason: Reason, problem: str, remedy: str, field: str = "paths"):
        super().__init__(f"{problem}; {remedy}")
        self.reason, self.problem, self.remedy, self.field = reason, problem, remedy, field


LeaveOut = Callable[[BadDocumentError], None]
"""Is told of each document that cannot be used: it counts it, or raises."""


@dataclasses.dataclass
class DataReport:
    """What was left out of the data.

    Attributes:
      counts: documents for each reason; a file that cannot be read to its end counts as one.
      examples: the problem of the first of them.
      notes: what else there is to say of how the files were opened, in lines.
    """

    counts: dict[Reason, int] = dataclasses.field(default_factory=dict)
    examples: dict[Reason, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, bad: BadDocumentError) -> None:
        """Count a document that is left out."""
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        self.examples.setdefault(bad.reason, bad.problem)

    def merge(self, later: "DataReport") -> None:
        """Count also what another report has counted."""
        for reason, count in later.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples.setdefault(reason, later.examples[reason])
        self.notes += later.notes

    @property
    def total(self) -> int:
        """Number of documents that were left out."""
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """Return what to tell people: how many were left out, the first for each reason, and the notes."""
        if not self.counts:
            return self.notes
        reasons = [
            f"  {self.counts[reason]:,} {reason}, the first: {self.examples[reason]}"
            for reason in Reason
            if reason in self.counts
        ]
        return [f"Documents left out: {self.total:,}", *reasons, *self.notes]
