"""Tables that fit the terminal: headers and words wrap, figures never, and what is too wide is printed in parts."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_GAP = 3
"""Characters of a column beside its content: a space on both sides and a border; a table has one border more."""


def show(table: Table, console: Console | None = None, *, keys: int | None = None) -> None:
    """Print a table on a console, by default a plain one on stdout, no wider than that is; `keys` as for `fitted`."""
    console = console or Console(highlight=False)
    for part in fitted(table, console.width, keys):
        console.print(part)


def fitted(table: Table, width: int, keys: int | None = None) -> list[Table]:
    """Return the same table at most `width` characters wide, in as few parts as that takes.

    Each part begins with the first `keys` columns, by which a row is known: by default the columns of words that the
    table begins with, or its first one. Headers wrap between words, and so do the cells of columns that are not
    `no_wrap` and stand on the left; other cells are whole.
    """
    groups = _groups(table.columns, width, keys)
    parts = [_part(table, columns, width) for columns in groups]
    parts[0].title, parts[-1].caption = table.title, table.caption
    return parts


def _groups(columns: list[Column], width: int, number: int | None) -> list[list[Column]]:
    """The columns of each part."""
    if _table_width(map(_least, columns)) <= width:
        return [columns]
    number = number or max(next((i for i, column in enumerate(columns) if column.justify == "right"), 1), 1)
    keys, rest = columns[:number], columns[number:]
    groups: list[list[Column]] = [[*keys]]
    for column in rest:
        if len(groups[-1]) > len(keys) and _table_width(map(_least, [*groups[-1], column])) > width:
            groups.append([*keys])
        groups[-1].append(column)
    return groups


def _part(table: Table, columns: list[Column], width: int) -> Table:
    """A table of these columns, as wide as their content if that fits."""
    widths, most = [_least(column) for column in columns], [_most(column) for column in columns]
    while _table_width(widths) < width and widths != most:
        tightest = max(range(len(columns)), key=lambda i: most[i] / max(widths[i], 1))
        widths[tightest] += 1
    part = Table()
    for column, size in zip(columns, widths, strict=True):
        part.add_column(column.header, justify=column.justify, width=size, overflow="fold")
    for row, cells in zip(table.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
        part.add_row(*cells, style=row.style, end_section=row.end_section)
    return part


def _table_width(widths: Iterable[int]) -> int:
    return 1 + sum(size + _GAP for size in widths)


def _most(column: Column) -> int:
    """Characters of the longest line."""
    return max((len(line) for cell in _texts(column) for line in cell.splitlines()), default=0)


def _least(column: Column) -> int:
    """Characters of the longest piece that must not be broken."""
    header, *cells = _texts(column)
    whole = column.justify == "right" or column.no_wrap
    pieces = [piece for cell in cells for piece in (cell.splitlines() if whole else cell.split())]
    return max(map(len, [*header.split(), *pieces]), default=0)


def _texts(column: Column) -> list[str]:
    """The header and the cells without markup."""
    return [_plain(column.header), *map(_plain, column.cells)]


def _plain(cell) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
