#!/usr/bin/env python
"""Writes docs/results/NAME.md and docs/plots/results_NAME.png of every set of experiments that has records.

python docs/results.py [--check]        # --check writes nothing, and fails where a page is not that of its records
"""

import sys
from pathlib import Path

from rep_plugin.measure.plots import save_figure
from rep_plugin.openmmlab.experiments import list_sets, read_set
from rep_plugin.openmmlab.results import figure_of, page_of, read_records

DOCS = Path(__file__).parent
RECORDS = DOCS / "results/records"


def main() -> int:
    """Write, or compare; return the exit status."""
    check, stale = "--check" in sys.argv[1:], []
    for name in list_sets():
        experiments, records = read_set(name), read_records(RECORDS, name)
        if not records:
            continue
        page, text = DOCS / f"results/{name}.md", page_of(experiments, records)
        text += f"\n\n![every seed of every row](../plots/results_{name}.png)\n"
        if check:
            stale += [] if page.is_file() and page.read_text() == text else [page]
            continue
        page.write_text(text)
        with (DOCS / f"plots/results_{name}.png").open("wb") as file:
            save_figure(figure_of(experiments, records), file)
        print(page)
    for page in stale:
        print(f"{page} is not what its records say: run make results")
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
