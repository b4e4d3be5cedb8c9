#!/usr/bin/env python
"""Draws records, latency and, once it is complete, the warm start's top-1, for the README: docs/plots/measured.png.

python docs/draw_measured.py [FOLDER]
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

from rep_plugin.openmmlab.experiments import score
from rep_plugin.openmmlab.results import read_records

DOCS = Path(__file__).parent
RECORDS = DOCS / "results/records"
DEPLOYED, STOCK, PLAIN = "#2f6db5", "#b9c3cf", "#8fb4de"
ROWS = {
    "stock MobileNetV2, one cycle": ("stock", STOCK),
    "stock, then annealed, one cycle": ("all blocks merged,\nfrom stock, annealed", DEPLOYED),
    "all blocks linear, from scratch, one cycle": ("all blocks merged,\nfrom scratch", PLAIN),
}


def main() -> None:
    """Write the plot."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "plots"
    records = read_records(RECORDS, "warm_start")
    complete = all(len(records.get(name, ())) >= 3 for name in ROWS)
    figure = Figure(figsize=(8.6 if complete else 5.2, 2.9), layout="constrained")
    left, *others = figure.subplots(1, 2, width_ratios=(1.4, 1)) if complete else [figure.subplots()]

    latency = json.loads((RECORDS / "benchmarks/latency.json").read_text())["rows"]
    for row, (_, ours, stock, _) in enumerate(latency):
        for value, y, color in ((stock, row - 0.18, STOCK), (ours, row + 0.18, DEPLOYED)):
            left.barh(y, float(value), 0.34, color=color)
            left.text(float(value) + 0.15, y, value, va="center", fontsize=8)
    left.set_yticks(range(len(latency)), [row[0] for row in latency], fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 1.2 * max(float(stock) for _, _, stock, _ in latency))
    left.set_title("ms for one image, width 1.0", fontsize=9)
    handles = [left.barh(0, 0, color=color) for color in (STOCK, DEPLOYED)]
    left.legend(handles, ["stock MobileNetV2, BN folded", "Rep-MobileNetV2, deployed"], fontsize=8, loc="lower right")

    for right in others:
        for row, (name, (_, color)) in enumerate(ROWS.items()):
            scores = [score(run) for run in records[name]]
            mean = statistics.mean(scores)
            right.errorbar(mean, row, xerr=statistics.stdev(scores), fmt="o", capsize=4, color=color)
            right.text(mean, row - 0.17, f"{mean:.2f}", ha="center", fontsize=8)
        right.set_yticks(range(len(ROWS)), [label for label, _ in ROWS.values()])
        right.set_ylim(len(ROWS) - 0.5, -0.5)
        right.set_title("top-1 %, Fashion-MNIST, width 0.5", fontsize=9)
    for axes in (left, *others):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(folder / "measured.png", dpi=110, metadata={"Software": None})
    print(folder / "measured.png")


if __name__ == "__main__":
    main()
