"""Rich tables as all reports have them."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where something is printed
    from rich.table import Table


def new_table(title: str | None, columns: Sequence[str], left: Collection[str] = ()) -> "Table":
    """Return a rich table without rows. Cells that do not fit are folded: names stay whole.

    Args:
        title: of the table.
        columns: their heads; the first is aligned to the left.
        left: others that are aligned to the left.

    Returns:
        The table.
    """
    from rich.table import Table

    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 or column in left else "right", overflow="fold")
    return table
