"""Plots of what was done, drawn with matplotlib and no display: as PNG files or as arrays."""

from collections.abc import Collection, Mapping, Sequence
from typing import BinaryIO

from rep_plugin.optional import require

require("matplotlib", "plots", "drawing plots")

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rep_plugin.errors import ArgumentError

PALE, BLUE, GREY, RED = "#cfd8e6", "#2f6db5", "#9a9a9a", "#c8452c"
LINES = (BLUE, RED, "#3f8f4f", "#8a5fb0", "#b88a1e")
BINS = 128
DPI = 120


def save_figure(figure: Figure, file: BinaryIO) -> None:
    """Write a plot as PNG.

    Args:
        figure: the plot.
        file: an open binary file.
    """
    figure.savefig(file, format="png", dpi=DPI)


def to_array(figure: Figure) -> np.ndarray:
    """Return a plot as RGB pixels (H, W, 3), 8 bit."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_widths(
    widths: Mapping[str, tuple[int, int]], file: BinaryIO, title: str = "", frozen: Collection[str] = ()
) -> None:
    """Write :func:`widths_figure` as PNG.

    Args:
        widths: layer -> channels (before, after).
        file: an open binary file.
        title: title of the plot.
        frozen: layers that cannot be pruned.
    """
    save_figure(widths_figure(widths, title, frozen), file)


def widths_figure(widths: Mapping[str, tuple[int, int]], title: str = "", frozen: Collection[str] = ()) -> Figure:
    """Return a bar plot of each layer's channels, before (pale) and after; frozen layers are grey.

    Args:
        widths: layer -> channels (before, after).
        title: title of the plot.
        frozen: layers that cannot be pruned.

    Returns:
        The plot.
    """
    figure = Figure(figsize=(9, max(2.5, 0.22 * len(widths) + 1.2)), layout="constrained")
    axes = figure.subplots()
    places = range(len(widths))
    before, after = [w[0] for w in widths.values()], [w[1] for w in widths.values()]
    axes.barh(places, before, color=PALE, label="before")
    colors = [GREY if name in frozen else BLUE for name in widths]
    axes.barh(places, after, color=colors, height=0.5, label="after")
    for place, (old, new) in zip(places, widths.values()):
        axes.annotate(
            f"{new} / {old}", (old, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6
        )
    axes.set_yticks(places, list(widths), fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)  # a layer of 16 is read as well as one of 1280
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlim(0.8, 3 * max(before, default=1))  # a layer of 1 is seen
    axes.margins(y=0.01)
    axes.set_xlabel("channels")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside upper right", fontsize=7, ncols=2)
    return figure


def gammas_figure(gammas: Sequence[float] | np.ndarray, title: str = "") -> Figure:
    """Return a histogram of the absolute scaling factors of batch norms, and their cumulative distribution.

    The first of the 128 bins, near zero, is red, with its share. The curve shows the gamma below which a share lies.

    Args:
        gammas: scaling factors.
        title: title of the plot.

    Returns:
        The plot.

    Raises:
        ArgumentError: no gammas.
    """
    sizes = np.sort(np.abs(np.asarray(gammas, dtype=np.float64)))
    if not len(sizes):
        raise ArgumentError("got no gammas to draw, expected at least 1")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    top = max(sizes[-1], 1e-12)
    counts, edges = np.histogram(sizes, bins=BINS, range=(0, top))
    bars = left.bar(edges[:-1], counts, width=top / BINS, align="edge", color=BLUE)
    bars[0].set_color(RED)
    share = counts[0] / len(sizes)
    label = f"below {edges[1]:.2g}: {counts[0]:,} of {len(sizes):,}, {share:.1%}"
    left.legend([bars[0]], [label], fontsize=8, loc="upper right")
    left.set_yscale("symlog", linthresh=1)  # the red bin may hold nearly all
    left.yaxis.set_major_formatter("{x:.0f}")
    left.set_ylim(0, 4 * max(counts.max(), 1))
    left.set_xlim(-0.01 * top, 1.01 * top)
    left.set_xlabel("|gamma|")
    left.set_ylabel("number of gammas, log scale")

    right.plot(
        np.append(sizes, top), np.arange(len(sizes) + 1).clip(1) / len(sizes), color=BLUE, drawstyle="steps-post"
    )
    for part in (0.2, 0.4, 0.6, 0.8):
        cut = sizes[min(int(part * len(sizes)), len(sizes) - 1)]
        right.plot([cut], [part], "o", color=RED, markersize=4)
        right.annotate(
            f"{part:.0%} below {cut:.2g}", (cut, part), xytext=(6, -9), textcoords="offset points", fontsize=7
        )
    right.set_xlim(-0.01 * top, 1.01 * top)
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.grid(alpha=0.3)
    right.set_xlabel("|gamma|")
    right.set_ylabel("share of gammas below")
    figure.suptitle(title, fontsize=10)
    return figure


def accuracy_figure(
    curves: Mapping[str, Mapping[float, float]], what: str = "top-1, %", title: str = "", dense: float | None = None
) -> Figure:
    """Return a plot of a validation metric over the share of channels removed, one curve for each label.

    Args:
        curves: label -> {share of channels removed: metric}.
        what: label of the metric's axis.
        title: title of the plot.
        dense: the metric before pruning, drawn as a dashed line.

    Returns:
        The plot.

    Raises:
        ArgumentError: no point at all.
    """
    if not any(curves.values()):
        raise ArgumentError("got no metrics to draw, expected at least 1")
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate(curves.items()):
        color = LINES[index % len(LINES)]
        shares = sorted(points)
        values = [points[share] for share in shares]
        axes.plot([100 * share for share in shares], values, "o-", color=color, label=label, markersize=4)
        if len(curves) > 2:
            continue  # numbers of more would cover each other
        for share, value in zip(shares, values):
            axes.annotate(
                f"{value:.1f}", (100 * share, value), xytext=(0, 5 if index else -10), textcoords="offset points",
                fontsize=6, ha="center", color=color,
            )  # fmt: skip
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", linewidth=1, label=f"before pruning, {dense:.1f}")
    axes.set_xlim(0, 100)
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)
    axes.set_xlabel("share of prunable channels removed, %")
    axes.set_ylabel(what)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    return figure


def layers_figure(
    gains: Mapping[str, float], spreads: Mapping[str, tuple[float | None, float]], title: str = ""
) -> Figure:
    """Return a bar plot of what each layer costs in int8, beside how uneven its channels are before and after a merge.

    Args:
        gains: layer -> dB that the outputs gain where it alone stays in float.
        spreads: layer -> its widest channel against its narrowest, before (None: not known) and after.
        title: title of the plot.

    Returns:
        The plot.

    Raises:
        ArgumentError: no layers.
    """
    if not gains:
        raise ArgumentError("got no layers to draw, expected at least 1")
    figure = Figure(figsize=(9, max(2.5, 0.2 * len(gains) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(gains))
    left.barh(places, list(gains.values()), color=[RED if gain > 0 else GREY for gain in gains.values()])
    left.set_yticks(places, list(gains), fontsize=6)
    left.invert_yaxis()
    left.set_xlabel("dB gained where this layer stays in float")
    before = {place: spread for place, (spread, _) in zip(places, spreads.values()) if spread is not None}
    right.barh(list(before), list(before.values()), color=PALE, label="before the merge")
    right.barh(places, [spread for _, spread in spreads.values()], color=BLUE, height=0.5, label="after")
    right.set_xscale("log")
    right.set_xlim(left=0.9)  # 1: all channels are alike
    right.set_xlabel("widest channel / narrowest")
    for axes in (left, right):
        axes.margins(y=0.01)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.legend(loc="outside upper right", fontsize=7, ncols=2)
    return figure


def draw_frontier(
    points: Sequence[tuple[float, float]], here: tuple[float, float] | None, x: str, y: str, title: str, file: BinaryIO
) -> None:
    """Write a plot of the best loss for every budget as PNG.

    Args:
        points: (cost, loss) of each choice.
        here: the one that was chosen, in red; or None.
        x: label of the costs.
        y: label of the losses.
        title: title of the plot.
        file: an open binary file.

    Raises:
        ArgumentError: no points.
    """
    if not points:
        raise ArgumentError("got no choices to draw, expected at least 1")
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*sorted(points)), "o-", color=BLUE, markersize=3)
    if here is not None:
        axes.plot(*here, "o", color=RED, label="chosen")
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    save_figure(figure, file)
