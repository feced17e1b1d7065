"""Does the planner know who wins? Its predictions beside comparisons that others published.

  python scripts/check_ranking.py

Factors are speeds over that of the first rival. The order agrees if every pair that the publication tells apart, by
more than 3%, is predicted in its order. The exit status is 1 if one is not.
"""

import interrupt  # noqa: F401 - first, so that Ctrl-C is heard while the others load

# isort: split

import sys

from rich.console import Console
from rich.table import Table

from ring_attention.planning.prediction.published import COMPARISONS


def main() -> int:
    """Print the table."""
    table = Table(title="Speed over the first: published | predicted", caption="what a source leaves open is assumed")
    for name in ("comparison", "source", "assumed", "rivals", "order"):
        table.add_column(name, overflow="fold")
    agree = True
    for comparison in COMPARISONS:
        predicted, same = comparison.predict(), comparison.order_agrees()
        agree &= same
        rivals = "\n".join(f"{name} {x:.2f} | {predicted[name]:.2f}" for name, x in comparison.published.items())
        verdict = "agrees" if same else "[red]differs[/red]"
        table.add_row(comparison.name, comparison.source, comparison.assumed, rivals, verdict, end_section=True)
    Console(width=118, highlight=False).print(table)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
