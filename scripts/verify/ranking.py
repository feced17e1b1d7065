"""Does the planner know who wins? Its predictions beside comparisons that others published.

  python -m scripts.verify ranking

Factors are speeds over that of the first rival. The order agrees if every pair that the publication tells apart, by
more than 3%, is predicted in its order. The exit status is 1 if one is not.
"""

from rich.table import Table

from ring_attention.commands.arguments import Parser
from ring_attention.tables import show
from scripts.verify.published import COMPARISONS


def main(argv: list[str]) -> int:
    """Print the table."""
    Parser(description=__doc__).parse_args(argv)
    table = Table(title="Speed over the first: published | predicted", caption="what a source leaves open is assumed")
    for name in ("comparison", "source", "rivals", "order"):
        table.add_column(name, no_wrap=name == "rivals")
    agree = True
    for comparison in COMPARISONS:
        predicted, same = comparison.predict(), comparison.order_agrees()
        agree &= same
        rivals = "\n".join(f"{name} {x:.2f} | {predicted[name]:.2f}" for name, x in comparison.published.items())
        verdict = "agrees" if same else "[red]differs[/red]"
        compared = f"{comparison.name}; assumed: {comparison.assumed}"
        table.add_row(compared, comparison.source, rivals, verdict, end_section=True)
    show(table)
    return 0 if agree else 1
