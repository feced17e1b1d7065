"""What came of a soak, for a person and for a program."""

import collections
import dataclasses
import statistics

from rich.markup import escape
from rich.table import Table

from .damage import HARMLESS
from .session import Session
from .verdicts import SORTS, Outcome


def line_of(outcome: Outcome) -> str:
    """One fault in one line: when, what, and what came of it."""
    minutes, seconds = divmod(int(outcome.seconds), 60)
    text = f"{minutes:3}:{seconds:02}  {outcome.kind:18} at step {outcome.step:4}  {'; '.join(outcome.notes)}"
    problems = [f"\n        [bold red]{sort}: {escape(words)}[/]" for sort, words in outcome.problems]
    return escape(text) + "".join(problems)


def table_of(session: Session) -> Table:
    """A row for each kind of fault."""
    table = Table(title="Faults", caption="steps lost and allowed: mean and max of steps done again, and the bound")
    table.add_column("kind", no_wrap=True)
    for name in ("injected", "as promised", "SIGKILLs", "lost, mean", "lost, max", "bound"):
        table.add_column(name, justify="right")
    for kind in session.kinds:
        outcomes = [outcome for outcome in session.outcomes if outcome.kind == kind]
        good = [outcome for outcome in outcomes if not outcome.problems]
        lost = [outcome.lost for outcome in outcomes if outcome.lost is not None]
        table.add_row(
            kind,
            str(len(outcomes)),
            str(len(good)),
            str(sum(outcome.kills for outcome in outcomes)),
            f"{statistics.mean(lost):.1f}" if lost else "",
            str(max(lost)) if lost else "",
            str(max(outcome.bound for outcome in outcomes)) if lost else "",
            style=None if len(good) == len(outcomes) else "bold red",
        )
    return table


def as_json(session: Session) -> dict:
    """Everything, fit for JSON."""
    outcomes = session.outcomes + session.ends
    sorts = collections.Counter(sort for outcome in outcomes for sort, _ in outcome.problems)
    lost = [outcome.lost for outcome in outcomes if outcome.lost is not None]
    return {
        "seconds": session.seconds,
        "kills_survived": sum(outcome.kills for outcome in session.outcomes if not outcome.problems),
        "most_kills_of_one_run": session.most_kills,
        "steps_lost": {"mean": statistics.mean(lost) if lost else 0, "max": max(lost, default=0)},
        "steps_beyond_the_newest_begun": max((outcome.beyond_begun for outcome in outcomes), default=0),
        "checkpoint_every": session.checkpoint_every,
        "damage_to_files_that_are_not_read": sum(HARMLESS in outcome.notes for outcome in outcomes),
        "runs_to_the_end": len(session.ends),
        "faults": len(session.outcomes),
        "problems": sum(sorts.values()),
        "by_sort": {sort: sorts[sort] for sort in SORTS},
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def summary_of(session: Session) -> str:
    """The figures that count, a few lines."""
    figures = as_json(session)
    lost, interval = figures["steps_lost"], figures["checkpoint_every"]
    sorts = ", ".join(f"{count} x {sort}" for sort, count in figures["by_sort"].items())
    ends = [f"[bold red]{end.run}: {escape(words)}[/]" for end in session.ends for _, words in end.problems]
    return "\n".join(
        [
            f"{figures['faults']} faults in {figures['seconds'] / 60:.1f} minutes; "
            f"{figures['kills_survived']} SIGKILLs survived, {figures['most_kills_of_one_run']} of them by one run; "
            f"{figures['runs_to_the_end']} runs trained to their end.",
            f"Steps lost: {lost['mean']:.1f} on average, {lost['max']} at most; "
            f"{figures['steps_beyond_the_newest_begun']} at most beyond the checkpoint begun last, {interval} allowed.",
            f"Damage done to files that a restore does not read: {figures['damage_to_files_that_are_not_read']}.",
            f"Wrong: {sorts}.",
            *ends,
        ]
    )
