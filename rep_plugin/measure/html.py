"""One HTML file that holds everything: tables, notes and plots, with no link to anything outside of it."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from itertools import chain, repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where something is drawn
    from rich.table import Table

    from rep_plugin.measure.plots import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem }
.wide { overflow-x: auto } img { max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #dde3ea }
th { border-bottom: 2px solid #9aa7b5 } .left { text-align: left }
@media (prefers-color-scheme: dark) {
  body { background: #16191d; color: #ddd } img { background: #fff } th, td { border-color: #3a424c }
}
"""


def page_of(tables: Sequence["Table"], notes: Sequence[str] = (), figures: Iterable["Figure"] = ()) -> str:
    """Return a page.

    Args:
        tables: one below the other, each with its title; that of the first is the page's.
        notes: one sentence each.
        figures: plots, below the tables.

    Returns:
        The page, in HTML.
    """
    title = escape(str(tables[0].title))
    parts = [part for table, level in zip(tables, chain(["h1"], repeat("h2"))) for part in _table(table, level)]
    if notes:
        parts += ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"]
    parts += map(_image, figures)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>'


def _table(table: "Table", level: str) -> list[str]:
    sides = [' class="left"' if column.justify == "left" else "" for column in table.columns]
    rows = [[str(column.header) for column in table.columns], *zip(*(map(str, c.cells) for c in table.columns))]
    lines = [
        "".join(f"<{tag}{side}>{escape(cell)}</{tag}>" for side, cell in zip(sides, row))
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows)
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return [f"<{level}>{escape(str(table.title))}</{level}>", f'<div class="wide"><table>\n{body}\n</table></div>']


def _image(figure: "Figure") -> str:
    from rep_plugin.measure.plots import save_figure

    save_figure(figure, file := io.BytesIO())
    return f'<p><img alt="plot" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"></p>'
