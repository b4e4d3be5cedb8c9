"""Merging linear sequences that were trained as separate, zero-padded layers: exact at the border too.

``1x1(-BN) -> KxK(pad)(-BN) -> 1x1(-BN)`` without activation becomes one convolution with a position-dependent bias, see
:mod:`rep_plugin.functional.padded`.
"""

import math
from collections.abc import Collection, Iterable
from functools import reduce

import torch
from torch import fx, nn

from rep_plugin.arguments import checked
from rep_plugin.blocks.layers import require_eval_mode, why_not_average
from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import pair
from rep_plugin.functional.padded import PaddedConv, compose_padded
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.verify import require_rounded, verify_equivalence
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.fixed import UNSELECTED, Fixed, find_fixed
from rep_plugin.reparam.fx_parts import Readers, trace_parts
from rep_plugin.reparam.linear_layers import flatten_layers, is_plain_bn, is_plain_conv, read_layer


@checked
@torch.no_grad()
@private_random()
def merge_sequence(layers: nn.Module | Iterable[nn.Module]) -> nn.Conv2d:
    """Return the one layer equal, in eval mode, to linear layers that run one after the other.

    It is compared with them in float64 on random maps, at a relative tolerance of 1e-9.

    Args:
        layers: a Sequential or its parts: Conv2d, BatchNorm2d, AvgPool2d, Identity, dropout, nested Sequentials. They are not
            changed.

    Returns:
        An ``nn.Conv2d`` or, where a bias stands before a zero padding, a
        :class:`rep_plugin.reparam.border_conv.BorderConv2d`.

    Raises:
        NotMergeableError: a layer is not linear, or has a hook or a replaced method.
        TrainModeError: a BN is in train mode.
        ArgumentError: the layers are not one convolution at the border (two windows that both pad).
        EquivalenceError: a layer computes something else than its class says, or values are not finite.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).eval()
        >>> merge_sequence(layers)
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    whole = (
        layers
        if type(layers) is nn.Sequential
        else nn.Sequential(*([layers] if isinstance(layers, nn.Module) else layers))
    )
    require_eval_mode(whole)
    merged = _merge_flat(flatten_layers([whole]))
    exact = copy_model(whole).double()
    proven = _merge_flat(flatten_layers([exact]))
    height, width = ((size - 1) * step + 1 for size, step in zip(merged.kernel_size, merged.dilation))
    shapes = [(2, merged.in_channels, height + 5, width + 8), (2, merged.in_channels, height + 4, width + 3)]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator).to(merged.weight.device) for shape in shapes]
    verify_equivalence(exact, proven, maps, keep=False)
    require_rounded(merged, proven)
    return merged


def _merge_flat(flat: list[nn.Module]) -> nn.Conv2d:
    if not any(isinstance(layer, nn.Conv2d) for layer in flat):
        raise ArgumentError(f"a sequence of {len(flat)} layers holds no convolution to merge into")
    return build_conv(compose_run(flat), flat)


def compose_run(layers: list[nn.Module], before: PaddedConv | None = None) -> PaddedConv:
    """Return linear layers that run one after the other as one padded convolution, in float64.

    Args:
        layers: as :func:`rep_plugin.reparam.linear_layers.flatten_layers` returns them.
        before: a convolution in front of them.

    Returns:
        The convolution.

    Raises:
        ArgumentError: they are not one convolution at the border.
        NotMergeableError: a layer is not linear.
    """
    device = next(p.device for layer in layers for p in layer.parameters())
    first = next(layer for layer in layers if not isinstance(layer, nn.AvgPool2d))
    channels = read_layer(first, None, device).params.in_channels
    parts = [] if before is None else [before]
    for layer in layers:
        parts.append(read_layer(layer, channels, device))
        channels = parts[-1].params.out_channels
    return reduce(compose_padded, parts)


def _is_linear(module: nn.Module | None) -> bool:
    if module is None:
        return False
    if type(module) is nn.AvgPool2d:
        return why_not_average(module, padded=any(pair(module.padding))) is None
    return is_plain_conv(module) or is_plain_bn(module)


def find_chains(readers: Readers, stays: Collection[fx.Node] = ()) -> list[list[fx.Node]]:
    """Find the longest runs of linear layers of which each reads the one before, and nothing else does.

    Args:
        readers: who reads what.
        stays: layers that must stay as they are.

    Returns:
        The runs.
    """
    chains: list[list[fx.Node]] = []
    ends: dict[fx.Node, list[fx.Node]] = {}
    for node in readers.calls:
        if node in stays or not _is_linear(readers.module(node)):
            continue
        chain = ends.pop(readers.source(node), None)
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(node)
        ends[node] = chain
    return chains


def _area(layer: nn.Module) -> int:
    """How many positions of its input a layer takes for one of its output."""
    if not isinstance(layer, (nn.Conv2d, nn.AvgPool2d)):
        return 1
    vertical, horizontal = pair(layer.stride)
    return vertical * horizontal


def _count_convs(layers: list[nn.Module]) -> int:
    return sum(isinstance(layer, nn.Conv2d) for layer in layers)


def _cost(layers: list[nn.Module]) -> int:
    """Multiply-adds of separate layers for each position of the last one's output, borders not counted."""
    total, positions = 0, 1
    for layer in reversed(layers):
        total += layer.weight.numel() * positions if isinstance(layer, nn.Conv2d) else 0
        positions *= _area(layer)
    return total


def cheapest_split(layers: list[nn.Module]) -> list[tuple[int, int]]:
    """Cut a chain into runs, each merged into one layer, so that multiply-adds are fewest, then layers.

    Returns (start, stop) of the runs that hold two or more convolutions.
    """
    best: list[tuple[int, int, list[tuple[int, int]]]] = [(0, 0, [])]  # of the first n layers
    for stop in range(1, len(layers) + 1):
        options = []
        for start in range(stop):
            run = layers[start:stop]
            cost, area = _cost(run), math.prod(map(_area, run))
            if _count_convs(run) >= 2:
                try:
                    merged = compose_run(run)
                except ArgumentError:
                    continue  # not one convolution at the border
                cost = merged.params.kernel.numel() + (0 if merged.edge is None else merged.edge.numel())
            before_cost, before_count, runs = best[start]
            options.append((before_cost * area + cost, before_count + 1, [*runs, (start, stop)]))
        best.append(min(options, key=lambda option: option[:2]))
    return [(start, stop) for start, stop in best[-1][2] if _count_convs(layers[start:stop]) >= 2]


@torch.no_grad()
def merge_linear_(model: nn.Module, fixed: Fixed | None = None) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Merge the linear sequences of an eval-mode model in place, where that costs no more multiply-adds.

    Args:
        model: the model.
        fixed: what must stay as it is; by default it is found.

    Returns:
        (name of the layer that now computes the sequence, names of all its layers); the others become Identity. And notes on
        layers that must stay as they are.
    """
    fixed = find_fixed(model) if fixed is None else fixed
    parts, merged, notes = trace_parts(model, nn.Conv2d)[0], [], {}

    def traced(name: str) -> bool:
        return any(part.holds(name) for part in parts)

    for part in parts:
        readers = Readers(model, part)
        stays = {}
        for node in readers.calls:
            if (why := fixed.why_not_folded(part.full_name(node.target), traced, removed=True)) is not None:
                stays[node] = why
        for chain in find_chains(readers):
            if _count_convs([readers.module(node) for node in chain]) > 1:
                reasons = [stays[node] for node in chain if stays.get(node, UNSELECTED) != UNSELECTED]
                notes |= {why: f"a linear sequence is not merged at {why}" for why in reasons}
        for chain in find_chains(readers, stays):
            layers = [readers.module(node) for node in chain]
            for start, stop in cheapest_split(layers):
                names = [part.full_name(node.target) for node in chain[start:stop]]
                conv = _merge_flat(flatten_layers(layers[start:stop]))
                model.set_submodule(names[0], conv)
                for name in names[1:]:
                    model.set_submodule(name, nn.Identity())
                merged.append((names[0], names))
    return merged, list(notes.values())
