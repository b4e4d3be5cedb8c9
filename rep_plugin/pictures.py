"""Pictures of what was done, drawn with matplotlib and no display."""

from collections.abc import Collection, Mapping
from typing import BinaryIO

from matplotlib.figure import Figure


def draw_widths(
    widths: Mapping[str, tuple[int, int]], file: BinaryIO, title: str = "", frozen: Collection[str] = ()
) -> None:
    """Write a PNG of bars: the channels of each layer before (pale) and after; frozen layers are grey.

    ``widths``: layer -> (before, after).
    """
    figure = Figure(figsize=(9, max(2.5, 0.22 * len(widths) + 1.2)), layout="constrained")
    axes = figure.subplots()
    places = range(len(widths))
    before, after = [w[0] for w in widths.values()], [w[1] for w in widths.values()]
    axes.barh(places, before, color="#cfd8e6", label="before")
    colors = ["#9a9a9a" if name in frozen else "#2f6db5" for name in widths]
    axes.barh(places, after, color=colors, height=0.5, label="after")
    for place, (old, new) in zip(places, widths.values()):
        axes.annotate(
            f"{new} / {old}", (old, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6
        )
    axes.set_yticks(places, list(widths), fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)  # a layer of 16 is read as well as one of 1280
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlim(1, 3 * max(before, default=1))
    axes.margins(y=0.01)
    axes.set_xlabel("channels")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside upper right", fontsize=7, ncols=2)
    figure.savefig(file, format="png", dpi=120)
