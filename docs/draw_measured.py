#!/usr/bin/env python
"""Draws two tables of docs/benchmarks.md, latency and top-1, for the README: docs/plots/measured.png.

python docs/draw_measured.py [FOLDER]
"""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parent
DEPLOYED, STOCK, PLAIN = "#2f6db5", "#b9c3cf", "#8fb4de"


def table(header: str) -> list[list[str]]:
    """Return the cells below the first row that starts with ``header``."""
    rows = (DOCS / "benchmarks.md").read_text().partition(f"\n| {header} |")[2].splitlines()[2:]
    cells = []
    for row in rows:
        if not row.startswith("|"):
            break
        cells.append([cell.strip() for cell in row.strip("|").split("|")])
    return cells


def main() -> None:
    """Write the plot."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "plots"
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))

    latency = table("runtime")
    for row, (_, ours, stock, _) in enumerate(latency):
        for value, y, color in ((stock, row - 0.18, STOCK), (ours, row + 0.18, DEPLOYED)):
            left.barh(y, float(value), 0.34, color=color)
            left.text(float(value) + 0.15, y, value, va="center", fontsize=8)
    left.set_yticks(range(len(latency)), [row[0] for row in latency], fontsize=8)
    left.invert_yaxis()
    left.set_title("ms for one image, width 1.0", fontsize=9)
    handles = [left.barh(0, 0, color=color) for color in (STOCK, DEPLOYED)]
    left.legend(handles, ["stock MobileNetV2, BN folded", "Rep-MobileNetV2, deployed"], fontsize=8, loc="lower right")

    names = {"bottleneck": "branches", "plain": "plain 3x3, the\ndeployed form", "stock": "stock MobileNetV2"}
    colors = {"bottleneck": DEPLOYED, "plain": PLAIN, "stock": STOCK}
    forms = [(name.split()[0], *map(float, re.findall(r"[\d.]+", top1))) for name, top1, _ in table("trained as")]
    for row, (name, mean, spread) in enumerate(forms):
        right.errorbar(mean, row, xerr=spread, fmt="o", capsize=4, color=colors[name])
        right.text(mean, row - 0.17, f"{mean:.2f}", ha="center", fontsize=8)
    right.set_yticks(range(len(forms)), [names[name] for name, *_ in forms])
    right.set_ylim(len(forms) - 0.5, -0.5)
    right.set_title("top-1 %, Fashion-MNIST, width 0.5", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    left.set_xlim(0, 19)
    figure.savefig(folder / "measured.png", dpi=110, metadata={"Software": None})
    print(folder / "measured.png")


if __name__ == "__main__":
    main()
