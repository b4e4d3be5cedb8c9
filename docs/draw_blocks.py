#!/usr/bin/env python
"""Draws what each block trains and what it ships, from the blocks themselves: docs/plots/<family>.png.

python docs/draw_blocks.py [FOLDER]
"""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.families import ACBlock, DiverseBranchBlock, LargeKernelBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.blocks.inverted_residual import RepInvertedResidual

BLOCKS = {
    "rep_mobilenetv2": ("Rep-MobileNetV2, 32 channels", lambda: RepInvertedResidual(32, 32)),
    "repvgg": ("RepVGG, 64 channels", lambda: RepVGGBlock(64, 64, act=nn.ReLU())),
    "acb": ("asymmetric convolution block, 64 channels", lambda: ACBlock(64, 64)),
    "dbb": ("diverse branch block, 64 channels", lambda: DiverseBranchBlock(64, 64)),
    "mobileone": (
        "MobileOne, 64 channels, depthwise, 4 copies",
        lambda: MobileOneBlock(64, 64, groups=64, copies=4, act=nn.ReLU()),
    ),
    "large_kernel": ("RepLKNet, 128 channels, depthwise", lambda: LargeKernelBlock(128, 128, groups=128)),
}
COLORS = {"conv": "#cfe0f5", "bn": "#e4efd8", "pool": "#f7e3c6", "act": "#eadcf0"}
WIDTH, HEIGHT, STEP_X, STEP_Y = 1.55, 0.52, 1.85, 0.86


def describe(op: nn.Module) -> tuple[str, str]:
    """Return (text, kind) of a layer."""
    if isinstance(op, nn.Conv2d):
        size = "x".join(map(str, op.kernel_size))
        if op.groups == op.in_channels > 1:
            return f"{size} depthwise\n{op.out_channels}", "conv"
        return f"{size} conv\n{op.in_channels} > {op.out_channels}", "conv"
    if isinstance(op, nn.modules.batchnorm._BatchNorm):
        return "BN", "bn"
    if isinstance(op, nn.AvgPool2d) or "Pool" in type(op).__name__:
        return "3x3 average", "pool"
    return type(op).__name__, "act"


def box(axes: Axes, x: float, y: float, text: str, kind: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=COLORS[kind],
            edgecolor="#55606e",
            linewidth=0.8,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, linespacing=1.05)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = dict(arrowstyle="-|>", color="#55606e", linewidth=0.8, shrinkA=0, shrinkB=0, mutation_scale=8)
    axes.annotate("", end, start, arrowprops=style)


def draw_column(axes: Axes, x: float, ops: list[tuple[str, str]], top: float, bottom: float) -> None:
    """Boxes from the input's line (``top``) to the sum's (``bottom``), evenly spaced."""
    gap = (top - bottom) / (len(ops) + 1)
    places = [top - gap * (index + 1) for index in range(len(ops))]
    above = top
    for (text, kind), y in zip(ops, places):
        arrow(axes, (x, above), (x, y + HEIGHT / 2 + 0.02))
        box(axes, x, y, text, kind)
        above = y - HEIGHT / 2 - 0.02
    arrow(axes, (x, above), (x, bottom))


def draw(block: RepBlock, title: str, path: Path) -> None:
    """Write a PNG: the branches of a block on the left, the one convolution they become on the right."""
    branches = {name: [describe(op) for _, op in chain.named_children()] for name, chain in block.branches.items()}
    act = None if isinstance(block.act, nn.Identity) else describe(block.act)
    block.eval()
    block.switch_to_deploy()
    depth = max(map(len, branches.values()))
    top, bottom = 0.0, -STEP_Y * (depth + 1)
    right = STEP_X * len(branches) + 1.2
    figure = Figure(figsize=(1.05 * (right + WIDTH + 0.4), 0.78 * (depth + 3.4)), layout="constrained")
    axes = figure.subplots()
    columns = [STEP_X * index for index in range(len(branches))]
    middle = sum(columns) / len(columns)
    for x, (name, ops) in zip(columns, branches.items()):
        draw_column(axes, x, ops, top, bottom + 0.17)
        axes.text(x, top + 0.12, name, ha="center", va="bottom", fontsize=8, style="italic")
    for y in (top, bottom + 0.17):
        axes.plot([columns[0], columns[-1]], [y, y], color="#55606e", linewidth=0.8)
    circle = dict(boxstyle="circle,pad=0.15", fc="#ffffff", ec="#55606e")
    axes.text(middle, bottom + 0.17, "+", ha="center", va="center", fontsize=10, bbox=circle)
    draw_column(axes, right, [describe(block.reparam_conv)], top, bottom + 0.17)
    if act is not None:
        for x in (middle, right):
            box(axes, x, bottom - 0.62, *act)
            arrow(axes, (x, bottom + (0.0 if x == middle else 0.17)), (x, bottom - 0.62 + HEIGHT / 2 + 0.02))
    axes.text(middle, top + 0.62, "training", ha="center", fontsize=9, weight="bold")
    axes.text(right, top + 0.62, "deployed", ha="center", fontsize=9, weight="bold")
    axes.set_title(title, fontsize=9)
    axes.set_xlim(-WIDTH / 2 - 0.2, right + WIDTH / 2 + 0.2)
    axes.set_ylim(bottom - 1.0, top + 1.0)
    axes.set_axis_off()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_two(columns: dict[str, list[tuple[str, str]]], title: str, path: Path) -> None:
    """Write a PNG of two chains side by side, given as title -> [(text, kind)]."""
    bottom = -STEP_Y * (max(map(len, columns.values())) + 1)
    figure = Figure(figsize=(5.2, 0.78 * (1.6 - bottom)), layout="constrained")
    axes = figure.subplots()
    for x, (name, ops) in zip((0.0, 2.6), columns.items()):
        draw_column(axes, x, ops, 0.0, bottom)
        axes.text(x, 0.25, name, ha="center", fontsize=9, weight="bold")
    axes.set_title(title, fontsize=9)
    axes.set_xlim(-1.0, 3.6)
    axes.set_ylim(bottom - 0.1, 0.7)
    axes.set_axis_off()
    figure.savefig(path, dpi=110, metadata={"Software": None})


BILINEAR = {
    "training": [
        ("last map\nC x H x W", "act"),
        ("X Xt / HW\nC x C", "pool"),
        ("signed root, L2", "act"),
        ("linear\nC*C > classes", "conv"),
    ],
    "deployed": [
        ("last map\nC x H x W", "act"),
        ("upper triangle\nC(C+1)/2", "pool"),
        ("signed root, L2", "act"),
        ("linear\nC(C+1)/2 > classes", "conv"),
    ],
}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, build) in BLOCKS.items():
        draw(build(), title, folder / f"{name}.png")
        print(folder / f"{name}.png")
    draw_two(BILINEAR, "bilinear pooling, method='full'", folder / "bilinear.png")
    print(folder / "bilinear.png")


if __name__ == "__main__":
    main()
