#!/usr/bin/env python
"""Makes everything that was measured from the records: pages and plots of docs/results/, and tables in the other pages.

python docs/results.py [--check]        # --check writes nothing, and fails where a page is not that of its records

A table of records stands in a page between ``<!-- results: NAME -->`` and ``<!-- end of results -->``. NAME is a set of
experiments, or a record of a benchmark (``benchmarks/latency``), or ``pages``, for links to the pages of all sets. After a
colon stand the columns, in this order, where not all are shown.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

from rep_plugin.measure.plots import save_figure
from rep_plugin.openmmlab.experiments import ExperimentSet, list_sets, read_set
from rep_plugin.openmmlab.results import (
    Records,
    cells_of,
    figure_of,
    latency_figure_of,
    markdown_of,
    page_of,
    read_columns,
    read_records,
)

DOCS = Path(__file__).parent
RECORDS = DOCS / "results/records"
OTHERS = DOCS.parent / "benchmarks/experiments"  # sets that need more than the package
PLACE = re.compile(r"(<!-- results: ([\w/]+)(?:: (.+?))? -->\n\n).*?\n\n(<!-- end of results -->)", re.S)


@cache
def set_of(name: str) -> ExperimentSet:
    """Return a set, shipped or not."""
    return read_set(str(path) if (path := OTHERS / f"{name}.py").is_file() else name)


@cache
def records_of(name: str) -> Records:
    """Return the records of a set."""
    return read_records(RECORDS, name)


def recorded() -> list[str]:
    """Return the names of the sets that have records."""
    names = [*list_sets(), *sorted(path.stem for path in OTHERS.glob("*.py"))]
    return [name for name in names if records_of(name)]


def table_of(name: str, columns: str | None) -> str:
    """Return what stands in a place: the Markdown table of a set or of a benchmark, or the links."""
    source = ""
    if name == "pages":
        return "\n".join(f"- [{set_of(one).title}](results/{one}.md)" for one in recorded())
    if name.startswith("benchmarks/"):
        record = json.loads((RECORDS / f"{name}.json").read_text())
        cells = [record["columns"], *record["rows"]]
        torch = f"torch {version}, " if (version := record["versions"].get("torch")) else ""
        source = f"\n\nMeasured on {record['processor']}, {torch}at {record['commit']}, {record['date']}."
    else:
        cells = cells_of(set_of(name), records_of(name), read_columns(RECORDS, name))
    if columns:
        places = [cells[0].index(column) for column in columns.split(", ")]
        cells = [[row[place] for place in places] for row in cells]
    return markdown_of(cells) + source


def plots_of(name: str, records: Records) -> dict[str, tuple[str, Figure]]:
    """Return the plots of a set: {stem of the file: (what it shows, the plot)}."""
    plots = {f"results_{name}": ("every seed of every row", figure_of(set_of(name), records))}
    timed = latency_figure_of(set_of(name), records, read_columns(RECORDS, name))
    return plots | ({f"results_{name}_latency": ("accuracy over milliseconds", timed)} if timed else {})


def filled(page: Path) -> str:
    """Return a page with its tables made anew."""
    return PLACE.sub(lambda found: f"{found[1]}{table_of(found[2], found[3])}\n\n{found[4]}", page.read_text())


def main() -> int:
    """Write, or compare; return how many pages are stale."""
    sets = {name: records_of(name) for name in recorded()}
    texts = {
        DOCS / f"results/{name}.md": page_of(set_of(name), records, read_columns(RECORDS, name))
        + "".join(f"\n\n![{what}](../plots/{file}.png)" for file, (what, _) in plots_of(name, records).items())
        + "\n"
        for name, records in sets.items()
    }
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md"), *(DOCS.parent / "configs").rglob("README.md")]
    texts |= {page: filled(page) for page in pages if PLACE.search(page.read_text())}
    stale = [page for page, text in texts.items() if not page.is_file() or page.read_text() != text]
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"{page} is not what its records say: run make results")
        return len(stale)
    for page in stale:
        page.write_text(texts[page])
        print(page)
    for name, records in sets.items():
        for stem, (_, figure) in plots_of(name, records).items():
            with (DOCS / f"plots/{stem}.png").open("wb") as file:
                save_figure(figure, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
